"""Whom to trust: outcomes of streams in, verdicts about workers and pairs out."""

from __future__ import annotations

from router_story import handed_over

from diptych.policy.breaker import BreakerSettings
from diptych.policy.health import Health

WORKER = BreakerSettings(failures=3, first=0.5, longest=30.0, calm=60.0)
PAIR = BreakerSettings(failures=1, first=0.5, longest=30.0, calm=60.0)


def healthy() -> Health:
    return Health(WORKER, PAIR)


def test_a_stream_that_ends_well_speaks_for_both_of_its_workers() -> None:
    router = handed_over()
    health = router.policy.health
    for worker in ("p0", "d0", "d1"):
        health.worker_failed(worker, 0.0)
        health.worker_failed(worker, 0.0)
    router.token("d0", 2, last=True)
    for worker in ("p0", "d0", "d1"):
        health.worker_failed(worker, 0.0)
    assert health.workers.blocked() == {"d1"}  # three in a row; the other two have served in between


def test_a_prefill_worker_whose_hand_off_was_not_needed_has_proved_nothing() -> None:
    """The first token was the last one."""
    router = handed_over()
    router.submit("short")
    health = router.policy.health
    health.worker_failed("p0", 0.0)
    health.worker_failed("p0", 0.0)
    live = router.policy.live["short"]
    health.served(live)
    health.worker_failed("p0", 0.0)
    assert health.workers.blocked() == {"p0"}


def test_a_worker_that_is_gone_takes_its_own_pairs_along_and_no_others() -> None:
    health = healthy()
    for pair in (("p0", "d0"), ("p1", "d0"), ("p0", "d1")):
        health.handoff_failed(pair, 0.0)
    health.gone("d0", 0.0, died=True)
    assert health.pairs.blocked() == {("p0", "d1")}
    assert health.workers.blocked() == {"d0"}


def test_the_next_canary_is_due_when_the_first_breaker_has_been_open_for_long_enough() -> None:
    health = healthy()
    health.worker_failed("other", 0.0)
    assert health.next_due(0.0) is None
    health.gone("w", 1.0, died=True)
    health.handoff_failed(("p0", "d0"), 0.8)
    assert health.next_due(1.0) == 1.3
    assert health.due(["w", "p0", "d0"], 1.4) == [("p0", "d0")]
    assert health.next_due(1.4) == 1.5


def test_what_was_long_ago_is_forgotten() -> None:
    health = healthy()
    health.worker_failed("w", 0.0)
    health.handoff_failed(("p0", "d0"), 0.0)
    health.prune(60.0)
    assert not health.all_well
    health.prune(60.1)
    assert health.all_well
