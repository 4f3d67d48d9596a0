"""The two legs of a split request, messages out of turn, and workers that leave."""

from __future__ import annotations

import pytest
from router_story import Router, handed_over

from diptych.core import actions as do
from diptych.core import events as on
from diptych.core.fleet import WorkerState


@pytest.mark.parametrize("stage", ["reserved", "prefilling", "first token", "handed over"])
@pytest.mark.parametrize("end", ["cancel", "failure", "death", "timeout"])
@pytest.mark.parametrize("leg", ["p0", "d0"])
def test_either_leg_s_end_ends_the_other_at_once(stage: str, end: str, leg: str) -> None:
    router = Router("p0", "d0")
    router.submit()
    if stage != "reserved":
        router.handle(on.TicketGranted("d0", "r", b"t", 0))
    if stage in ("first token", "handed over"):
        router.first("p0")
    if stage == "handed over":
        router.token("d0", 1)
    match end:
        case "cancel":
            said = router.handle(on.RequestCancelled("r"))
        case "failure":
            said = router.handle(on.RequestFailed(leg, "r", "engine_corrupt", "nan"))
        case "death":
            said = router.handle(on.WorkerGone(leg))
        case _:
            said = router.at(300.1)
    aborted = {action.worker_id for action in said if isinstance(action, do.AbortOn)}
    over = {"p0"} if stage == "handed over" else set()  # its part is done
    if end in ("cancel", "timeout"):
        assert aborted == {"p0", "d0"} - over
    elif leg in over:
        assert aborted == set()  # and its end ends nothing
    else:
        assert aborted == {"p0", "d0"} - over - {leg}


def test_a_ticket_that_comes_twice_is_used_once_and_a_late_one_is_sent_back() -> None:
    router = Router("p0", "d0", "d1")
    router.submit()
    assert len(router.handle(on.TicketGranted("d0", "r", b"t", 0))) == 1
    assert router.handle(on.TicketGranted("d0", "r", b"t", 0)) == []
    assert router.handle(on.TicketGranted("d1", "r", b"t", 0)) == [do.AbortOn("d1", "r")]
    router.handle(on.RequestCancelled("r"))
    assert router.handle(on.TicketGranted("d0", "r", b"t", 0)) == [do.AbortOn("d0", "r")]
    assert router.policy.ignored == 3


def test_a_first_token_that_is_lost_with_its_worker_is_made_again() -> None:
    """The decode worker has gone on from it, but it never came to the router."""
    router = Router("p0", "d0")
    router.submit()
    router.handle(on.TicketGranted("d0", "r", b"t", 0))
    assert router.token("d0", 1) == []
    said = router.handle(on.WorkerGone("p0"))
    assert do.AbortOn("d0", "r") in said
    assert router.route() == "local=d0"


def test_a_worker_that_leaves_keeps_what_cannot_move_for_a_while() -> None:
    router = Router("p0", "d0", "d1")
    router.submit()  # waits for its ticket
    router.up("d0", WorkerState.DRAINING)
    router.at(20.0)
    assert "decode=d0" in router.route()
    assert router.policy.is_needed("d0")
    router.at(20.1)
    assert "decode=d1" in router.route()
    assert not router.policy.is_needed("d0")


def test_a_worker_that_has_left_has_not_failed() -> None:
    router = handed_over()
    router.up("d0", WorkerState.DRAINING)
    assert router.route() == "prefill=d0;decode=d1;transport=shm"
    router.handle(on.WorkerGone("d0"))  # its grace was too short
    assert router.policy.live["r"].crashes == 0
    assert router.policy.health.workers.known == ()
