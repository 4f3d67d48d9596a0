"""Every wait of the router has an end, and a code."""

from __future__ import annotations

import pytest
from router_story import LOCAL, Router, handed_over, running_on

from diptych.core import actions as do
from diptych.core import events as on
from diptych.core.fleet import WorkerState


@pytest.mark.fault(42)
def test_a_stalled_stream_goes_on_elsewhere_and_its_worker_is_blamed() -> None:
    router = handed_over()
    router.at(10.0)
    assert router.route().startswith("prefill=p0;decode=d0")
    said = router.at(10.1)
    assert do.AbortOn("d0", "r") in said
    assert router.route() == "prefill=p0;decode=d1;transport=shm"
    assert router.policy.health.workers.known == ("d0",)


def test_a_stream_that_stalls_while_others_get_on_is_nobody_s_fault() -> None:
    router = handed_over()
    router.submit("other", LOCAL)
    router.now = 5.0
    router.first("d0", "whoever")  # the engine of d0 runs
    router.at(11.0)
    assert "decode=d1" in router.route()
    assert router.policy.health.workers.known == ()


@pytest.mark.fault(42)
def test_a_handoff_that_hangs_is_the_fault_of_the_pair() -> None:
    router = Router("p0", "d0", "d1")
    router.submit()
    router.handle(on.TicketGranted("d0", "r", b"t", 0))
    router.first("p0")
    router.at(10.1)
    assert router.route() == "prefill=p0;decode=d1;transport=shm"
    assert router.policy.health.pairs.blocked() == {("p0", "d0")}
    assert router.policy.health.workers.known == ()


def test_a_ticket_that_does_not_come_is_asked_for_elsewhere() -> None:
    router = Router("p0", "d0", "d1")
    router.submit()
    said = router.at(50.1)
    assert do.AbortOn("d0", "r") in said
    assert "decode=d1" in router.route()
    assert router.policy.health.workers.known == ()  # to be full is no fault


def test_a_prefill_that_does_not_end_is_begun_elsewhere() -> None:
    router = Router("p0", "p1", "d0")
    router.submit()
    router.handle(on.TicketGranted("d0", "r", b"t", 0))
    router.at(40.1)
    assert "prefill=p1" in router.route()
    assert router.policy.health.workers.known == ("p0",)


@pytest.mark.parametrize(
    ("progress", "code"), [(0, "reserve_timeout"), (1, "first_token_timeout"), (2, "stall_timeout")]
)
def test_with_nobody_else_a_late_stream_stays_and_ends_in_the_end(progress: int, code: str) -> None:
    router = Router("m0", "m1")
    router.submit()
    [prefill, decode] = [part.split("=")[1] for part in router.route().split(";")[:2]]
    if progress:
        router.handle(on.TicketGranted(decode, "r", b"t", 0))
    if progress > 1:
        router.first(prefill)
        router.token(decode, 1)
    for name in ("m0", "m1"):
        router.up(name, WorkerState.STARTING)  # alive, but not to be given anything
    before = list(router.said)
    limit = {0: 50.0, 1: 40.0, 2: 10.0}[progress]
    router.at(limit + 1.0)
    router.at(limit + 60.0)
    assert router.said == before
    router.at(limit + 60.1)
    assert router.error().code == code
    assert router.error().retry_after > 0
    assert not router.policy.live


def test_a_stream_that_waits_for_its_turn_with_nobody_else_waits_on() -> None:
    """Preempted on the only worker, say, whose blocks others need for long answers."""
    router = Router("m0")
    router.submit(prefer=LOCAL)
    router.first("m0")
    for second in range(1, 299):
        router.now = float(second)
        router.first("m0", "whoever")
        assert router.at(router.now) == []
    assert "r" in router.policy.live


def test_the_queue_has_an_end() -> None:
    router = handed_over()
    for name in ("p0", "d0", "d1"):
        router.handle(on.WorkerGone(name))
    router.at(60.0)
    assert "r" in router.policy.live
    router.at(60.1)
    assert (router.error().code, router.error().status) == ("queue_timeout", 503)
    assert "worker d1 was lost" in router.error().message


def test_what_fails_everywhere_for_no_known_reason_has_an_end() -> None:
    router = Router("m0", "m1")
    router.submit(prefer=LOCAL)
    while live := router.policy.live.get("r"):
        if name := running_on(router):
            router.handle(on.RequestFailed(name, live.attempt_id, "bad_luck", "again"))
        router.at(router.now + 0.5)
    assert 60.0 < router.now < 120.0
    assert (router.error().code, "again" in router.error().message) == ("queue_timeout", True)


@pytest.mark.parametrize(("timeout", "ends"), [(None, 300.0), (12.0, 12.0), (900.0, 300.0)])
def test_a_request_has_an_end_which_the_client_may_bring_forward(timeout: float | None, ends: float) -> None:
    router = Router("m0")
    router.submit(prefer=LOCAL, timeout=timeout)
    router.first("m0")
    for second in range(int(ends) + 1):
        router.now = float(second)
        router.token("m0", 1 + second)
        router.at(float(second))
    assert "r" in router.policy.live
    said = router.at(ends + 0.1)
    assert router.error().code == "request_timeout"
    assert do.AbortOn("m0", "r") in said
