from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.fleet import BreakerState
from diptych.policy.breaker import Breakers, BreakerSettings

SETTINGS = BreakerSettings(failures=3, first=1.0, longest=8.0, calm=60.0)


def breakers() -> Breakers[str]:
    return Breakers(SETTINGS)


def reopened(them: Breakers[str], now: float) -> float:
    """Fail once more, for good; returns for how long it is open now."""
    them.failed("w", now, fatal=True)
    until = them.next_due(now)
    assert until is not None
    return until - now


def test_failures_in_a_row_open_it_and_a_success_starts_the_row_over() -> None:
    them = breakers()
    them.failed("w", 0.0)
    them.failed("w", 0.1)
    them.succeeded("w")
    them.failed("w", 0.2)
    them.failed("w", 0.3)
    assert them.state("w", 0.3) is BreakerState.CLOSED
    them.failed("w", 0.4)
    assert them.state("w", 0.4) is BreakerState.OPEN
    assert them.blocked() == {"w"}
    assert them.state("other", 0.4) is BreakerState.CLOSED


def test_what_is_being_probed_is_not_forgotten() -> None:
    them = breakers()
    them.failed("w", 0.0, fatal=True)
    them.probe("w")
    them.prune(1000.0)
    assert them.blocked() == {"w"}
    them.probe_succeeded("w")
    them.prune(1000.0)
    assert len(them) == 0


def test_only_a_probe_closes_it() -> None:
    them = breakers()
    them.failed("w", 0.0, fatal=True)
    them.succeeded("w")  # of a stream that began before
    assert them.due(0.9) == []
    assert them.due(1.0) == ["w"]
    assert them.state("w", 1.0) is BreakerState.HALF_OPEN
    assert them.blocked() == {"w"}
    them.probe("w")
    assert them.due(1.0) == []
    them.probe_succeeded("w")
    assert them.state("w", 1.0) is BreakerState.CLOSED
    assert them.blocked() == frozenset()


def test_a_probe_that_fails_opens_it_for_twice_as_long() -> None:
    them = breakers()
    them.failed("w", 0.0, fatal=True)
    them.probe("w")
    them.failed("w", 1.0)
    assert (them.due(2.9), them.due(3.0)) == ([], ["w"])


def test_stragglers_do_not_lengthen_it() -> None:
    them = breakers()
    for moment in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
        them.failed("w", moment)
    assert them.next_due(0.6) == 1.2


@pytest.mark.fault(47)
def test_who_dies_every_few_seconds_is_used_ever_less_until_it_is_calm() -> None:
    them = breakers()
    waits = []
    now = 0.0
    for _ in range(6):
        waits.append(reopened(them, now))
        now += waits[-1]
        them.probe("w")
        them.probe_succeeded("w")
        now += 5.0
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert reopened(them, now + 61.0) == 1.0


def test_what_was_long_ago_is_forgotten() -> None:
    them = breakers()
    for number in range(100):
        them.failed(f"w{number}", float(number))
    them.prune(101.0)
    assert len(them) == 59
    them.forget("w99")
    assert "w99" not in them.known


@given(st.lists(st.tuples(st.sampled_from(["failed", "fatal", "ok", "probe", "lost"]), st.floats(0.0, 30.0))))
def test_it_never_stays_out_of_use_for_longer_than_the_longest(steps: list[tuple[str, float]]) -> None:
    them, now = breakers(), 0.0
    for what, pause in steps:
        now += pause
        if what in ("failed", "fatal"):
            them.failed("w", now, fatal=what == "fatal")
        elif what == "ok":
            them.succeeded("w")
        elif "w" in them.known:
            them.probe("w")
            if what == "lost":
                them.probe_lost("w")
            else:
                them.probe_succeeded("w")
    if them.blocked():
        assert them.due(now + SETTINGS.longest) == ["w"]
        them.probe("w")
        them.probe_succeeded("w")
    assert them.blocked() == frozenset()
