"""What the simulation has found, each as the few events that it takes."""

from __future__ import annotations

from diptych.core.actions import DeliverFailure, ReserveBlocks, StartPrefill
from diptych.core.events import RequestSubmitted, TicketGranted, TokensMade, WorkerGone, WorkerUpdated
from diptych.core.fleet import Role, WorkerState, WorkerView
from diptych.core.request import Preference, Request, SampledToken, TokenOutput
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.routing import Demand, Routing, WorkerLoad


def view(worker_id: str, role: Role) -> WorkerView:
    return WorkerView(
        worker_id=worker_id, role=role, state=WorkerState.READY, epoch=1, num_blocks=64, transports=("shm",)
    )


def test_a_prefill_worker_that_is_lost_with_the_first_token_is_missed() -> None:
    """The decode worker went on from a first token that the router never got: it came with the hand-off, and to the
    router it was on its way when the connection of the prefill worker ended. Nobody sends it again."""
    router = RouterPolicy(Routing())
    for worker_id, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
        router.handle(WorkerUpdated(view(worker_id, role)), 0.0)
    request = Request(request_id="r", prompt_token_ids=tuple(range(64)), prefer=Preference.SPLIT)
    [reserve] = router.handle(RequestSubmitted(request), 0.0)
    assert isinstance(reserve, ReserveBlocks)
    [prefill] = router.handle(TicketGranted("d", "r", b"ticket", 0), 0.1)
    assert isinstance(prefill, StartPrefill)
    assert router.handle(TokensMade("d", (TokenOutput("r", 1, SampledToken(7)),)), 0.2) == []
    actions = router.handle(WorkerGone("p"), 0.3)
    assert actions, "the stream would wait for its first token for ever"
    assert not any(isinstance(action, DeliverFailure) for action in actions)


def test_two_workers_do_not_keep_their_blocks_for_each_other() -> None:
    """Each of two mixed workers had kept its blocks for pages that the other was to send, and so had none left to
    compute those that it was to send itself: both waited until the deadline of the hand-off."""
    fleet = [view("m0", Role.MIXED), view("m1", Role.MIXED), view("m2", Role.MIXED)]
    for loads in ({}, {"m0": WorkerLoad(9999, 9)}, {"m1": WorkerLoad(9999, 9)}, {"m2": WorkerLoad(9999, 9)}):
        choice = Routing().choose(Demand(1024, {}, Preference.SPLIT), fleet, loads)
        assert choice is not None
        assert choice.route.prefill is not None
        assert choice.route.prefill < choice.route.decode
