from __future__ import annotations

from diptych.core.request import Preference
from diptych.policy.recovery import MAX_ATTEMPTS, SuspectPairs, preference_after


def test_a_lost_worker_leaves_the_wish_and_a_failed_handoff_forbids_another() -> None:
    assert preference_after("worker_lost", 1, Preference.SPLIT) is Preference.SPLIT
    assert preference_after("worker_lost", 1, Preference.AUTO) is Preference.AUTO
    assert preference_after("kv_corrupt", 1, Preference.SPLIT) is Preference.LOCAL


def test_a_request_s_own_fault_and_too_many_attempts_end_it() -> None:
    assert preference_after("engine_corrupt", 1, Preference.AUTO) is None
    assert preference_after("kv_exhausted", 1, Preference.AUTO) is None
    assert preference_after("worker_lost", MAX_ATTEMPTS - 1, Preference.AUTO) is Preference.AUTO
    assert preference_after("worker_lost", MAX_ATTEMPTS, Preference.AUTO) is None


def test_a_pair_is_suspect_for_a_while() -> None:
    pairs = SuspectPairs(seconds=10.0)
    pairs.suspect(("p0", "d0"), now=0.0)
    pairs.suspect(("p1", "d0"), now=5.0)
    assert pairs.at(9.0) == {("p0", "d0"), ("p1", "d0")}
    pairs.suspect(("p0", "d0"), now=9.0)
    assert pairs.at(15.0) == {("p0", "d0")}
    assert pairs.at(19.0) == frozenset()


def test_a_new_life_is_not_suspect() -> None:
    pairs = SuspectPairs()
    pairs.suspect(("p0", "d0"), now=0.0)
    pairs.suspect(("p0", "d1"), now=0.0)
    pairs.forget("d0")
    assert pairs.at(1.0) == {("p0", "d1")}
