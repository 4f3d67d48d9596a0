"""One worker's decisions, event by event: what it orders, and what it puts off."""

from __future__ import annotations

import pytest

from diptych.core import actions as do
from diptych.core import events as on
from diptych.core.request import FinishReason, Request, SampledToken, SamplingParams
from diptych.core.ticket import TicketClaims
from diptych.engine.scripted import ScriptedModel
from diptych.policy.batching import BatchLimits
from diptych.policy.block_pool import BlockPool
from diptych.policy.worker import WorkerPolicy

LAYOUT = ScriptedModel(block_size=4).layout
EOS = 0


def make_policy(num_blocks: int = 16) -> WorkerPolicy:
    limits = BatchLimits(max_batch_tokens=8, max_sequences=4)
    return WorkerPolicy(LAYOUT, BlockPool(num_blocks, 4), limits, (EOS,), handoff_timeout=10.0)


def make_request(name: str = "r", num_tokens: int = 6, max_tokens: int = 3) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Request(request_id=name, prompt_token_ids=tuple(range(1, num_tokens + 1)), sampling=sampling)


def claims_for(request: Request, blocks: tuple[int, ...]) -> TicketClaims:
    return TicketClaims(
        request_id=request.request_id,
        worker_id="d0",
        epoch=1,
        blocks=blocks,
        first_block=0,
        num_tokens=len(request.prompt_token_ids),
        layout=LAYOUT,
        model_digest="m",
        salt="",
        nonce=b"n" * 16,
    )


def step(policy: WorkerPolicy, *tokens: int | None) -> list[do.WorkerAction]:
    samples = tuple(None if token is None else SampledToken(token) for token in tokens)
    return policy.handle(on.StepFinished(samples, seconds=0.01), now=1.0)


def kinds(actions: list[do.WorkerAction]) -> list[str]:
    return [type(action).__name__ for action in actions]


def test_a_local_request_from_arrival_to_end() -> None:
    policy = make_policy()
    assert kinds(policy.handle(on.ServeRequested(make_request()), now=0.5)) == ["RunStep"]
    first, run = step(policy, 50)
    assert isinstance(first, do.SendFirstToken)
    assert (first.output.index, first.queue_seconds, first.prefill_seconds) == (0, 0.0, 0.5)
    assert isinstance(run, do.RunStep)
    assert kinds(step(policy, 51)) == ["SendTokens", "RunStep"]
    forget, tokens = step(policy, 52)
    assert forget == do.ForgetRequest("r")
    assert isinstance(tokens, do.SendTokens)
    assert tokens.outputs[0].finish is FinishReason.LENGTH
    assert policy.idle
    assert policy.pool.num_used == 0


def test_a_stop_token_ends_the_request_at_once() -> None:
    policy = make_policy()
    policy.handle(on.ServeRequested(make_request()), now=0.0)
    first, *rest = step(policy, EOS)
    assert isinstance(first, do.SendFirstToken)
    assert first.output.finish is FinishReason.STOP
    assert kinds(rest) == ["ForgetRequest"]


def test_an_abort_waits_for_the_running_step() -> None:
    policy = make_policy()
    policy.handle(on.ServeRequested(make_request()), now=0.0)
    assert policy.handle(on.AbortRequested("r"), now=0.1) == [do.DropRow("r")]
    assert policy.pool.num_used > 0
    assert "ForgetRequest" in kinds(step(policy, 50))
    assert policy.pool.num_used == 0


def test_a_row_that_the_engine_has_dropped_gives_its_blocks_back_while_the_step_goes_on() -> None:
    policy = make_policy()
    policy.handle(on.ServeRequested(make_request("first", num_tokens=1, max_tokens=9)), now=0.0)
    for name in "ab":
        policy.handle(on.ServeRequested(make_request(name, num_tokens=3)), now=0.0)
    run = step(policy, 50)[-1]
    assert isinstance(run, do.RunStep)
    assert [row.sequence.request_id for row in run.batch.rows] == ["first", "a", "b"]
    assert policy.handle(on.AbortRequested("a"), now=1.0) == [do.DropRow("a")]
    assert policy.pool.num_used == 3
    assert policy.handle(on.RowsDropped(("a",)), now=1.1) == [do.ForgetRequest("a")]
    assert policy.pool.num_used == 2
    policy.check_integrity()
    assert not policy.knows("a")
    rate = policy.stats().prefill_rate
    first, tokens, run = step(policy, 51, None, 60)
    assert isinstance(first, do.SendFirstToken)
    assert first.output.request_id == "b"
    assert isinstance(tokens, do.SendTokens)
    assert [output.request_id for output in tokens.outputs] == ["first"]
    assert isinstance(run, do.RunStep)
    assert [row.sequence.request_id for row in run.batch.rows] == ["first", "b"]
    assert (policy.stats().rows_dropped, policy.stats().prefill_rate) == (1, rate)
    policy.check_integrity()


def test_blocks_of_a_dropped_row_can_be_granted_before_the_step_is_over() -> None:
    policy = make_policy(num_blocks=4)
    policy.handle(on.ServeRequested(make_request("a", num_tokens=7)), now=0.0)
    policy.handle(on.ReserveRequested(make_request("b", num_tokens=13)), now=0.0)
    policy.handle(on.AbortRequested("a"), now=1.0)
    forget, grant = policy.handle(on.RowsDropped(("a",)), now=1.1)
    assert forget == do.ForgetRequest("a")
    assert isinstance(grant, do.GrantTicket)
    assert step(policy, None) == []
    policy.check_integrity()
    assert policy.pool.num_cached == 0, "nothing of it was computed to the end"


def test_a_failed_step_does_not_fail_whom_it_has_dropped() -> None:
    policy = make_policy()
    policy.handle(on.ServeRequested(make_request("a")), now=0.0)
    policy.handle(on.AbortRequested("a"), now=1.0)
    policy.handle(on.RowsDropped(("a",)), now=1.1)
    assert policy.handle(on.StepFailed("engine_failed", "why"), now=1.2) == []
    assert policy.idle


def test_pages_of_a_prefill_that_was_dropped_are_abandoned() -> None:
    policy = make_policy()
    request = make_request(num_tokens=6)
    policy.handle(on.PrefillRequested(request, claims_for(request, (7, 8))), now=0.0)
    assert policy.handle(on.AbortRequested("r"), now=0.1) == [do.DropRow("r")]
    assert kinds(policy.handle(on.RowsDropped(("r",)), now=0.2)) == ["AbandonPush", "ForgetRequest"]
    assert step(policy, None) == []
    assert policy.pool.num_used == 2
    policy.handle(on.PushStopped("r"), now=0.3)
    assert policy.idle
    assert policy.pool.num_used == 0


def test_pages_leave_chunk_by_chunk_and_the_token_closes_the_handoff() -> None:
    policy = make_policy()
    request = make_request(num_tokens=11)
    [run] = policy.handle(on.PrefillRequested(request, claims_for(request, (7, 8, 9))), now=0.0)
    assert isinstance(run, do.RunStep)
    assert [(push.plan.first_block, push.plan.num_blocks) for push in run.pushes] == [(0, 2)]
    [run] = step(policy, None)
    assert isinstance(run, do.RunStep)
    assert [(push.plan.first_block, push.plan.num_blocks) for push in run.pushes] == [(2, 1)]
    first, close, forget = step(policy, 50)
    assert (type(first), type(close), type(forget)) == (do.SendFirstToken, do.CloseHandoff, do.ForgetRequest)
    assert policy.pool.num_used == 3
    policy.handle(on.PushAccepted("r"), now=2.0)
    assert policy.pool.num_used == 0


@pytest.mark.fault(41)
def test_a_handoff_that_is_aborted_keeps_its_blocks_until_the_sender_has_stopped() -> None:
    policy = make_policy()
    request = make_request()
    policy.handle(on.PrefillRequested(request, claims_for(request, (7, 8))), now=0.0)
    step(policy, 50)
    assert "AbandonPush" in kinds(policy.handle(on.AbortRequested("r"), now=1.0))
    assert policy.pool.num_used == 2
    policy.handle(on.PushAccepted("r"), now=1.0)  # too late: it counts for nothing
    assert policy.pool.num_used == 2
    policy.handle(on.PushStopped("r"), now=1.0)
    assert policy.pool.num_used == 0


def test_a_lost_link_is_heard_after_the_step() -> None:
    policy = make_policy()
    request = make_request()
    policy.handle(on.PrefillRequested(request, claims_for(request, (7, 8))), now=0.0)
    assert policy.handle(on.LinkLost("d0", ("r",)), now=0.5) == [do.DropRow("r")]
    actions = step(policy, 50)
    assert do.SendFailure("r", "transfer_failed", "the data connection to worker d0 broke") in actions
    assert "AbandonPush" in kinds(actions)


def test_a_ticket_for_something_else_is_refused() -> None:
    policy = make_policy()
    request = make_request()
    foreign = claims_for(make_request(num_tokens=9), (7, 8, 9))
    [failure] = policy.handle(on.PrefillRequested(request, foreign), now=0.0)
    assert isinstance(failure, do.SendFailure)
    assert failure.code == "ticket_refused"


@pytest.mark.fault(48)
def test_a_reservation_waits_for_room_and_is_granted_when_there_is() -> None:
    policy = make_policy(num_blocks=4)
    [grant] = policy.handle(on.ReserveRequested(make_request("a", num_tokens=12)), now=0.0)
    assert isinstance(grant, do.GrantTicket)
    assert policy.handle(on.ReserveRequested(make_request("b", num_tokens=8)), now=0.0) == []
    assert policy.stats().waiting == 1
    assert kinds(policy.handle(on.AbortRequested("a"), now=1.0)) == ["RevokeTicket", "ForgetRequest"]
    [grant] = policy.handle(on.WriterGone("a"), now=2.0)
    assert isinstance(grant, do.GrantTicket)
    assert grant.request.request_id == "b"


def test_a_reservation_that_is_aborted_leaves_the_queue_and_no_other_does() -> None:
    policy = make_policy(num_blocks=4)
    for name, num_tokens in (("a", 12), ("b", 15), ("c", 8)):
        policy.handle(on.ReserveRequested(make_request(name, num_tokens=num_tokens)), now=0.0)
    assert policy.stats().waiting == 2
    assert kinds(policy.handle(on.AbortRequested("b"), now=0.0)) == ["ForgetRequest"]
    assert policy.stats().waiting == 1
    policy.handle(on.AbortRequested("a"), now=0.0)
    [grant] = policy.handle(on.WriterGone("a"), now=0.0)
    assert isinstance(grant, do.GrantTicket)
    assert grant.request.request_id == "c"


def test_no_more_hand_offs_are_taken_than_sequences_may_run() -> None:
    policy = make_policy()
    names = [f"r{number}" for number in range(5)]
    granted = [policy.handle(on.ReserveRequested(make_request(name)), now=0.0) for name in names]
    assert [kinds(actions) for actions in granted] == [["GrantTicket"]] * 4 + [[]]
    assert policy.stats().waiting == 1
    policy.handle(on.HandoffComplete("r0", SampledToken(5)), now=0.0)  # runs now, and counts still
    assert policy.stats().waiting == 1
    policy.handle(on.AbortRequested("r1"), now=0.0)
    assert kinds(policy.handle(on.WriterGone("r1"), now=0.0)) == ["GrantTicket"]


@pytest.mark.fault(41, 42)
def test_an_overdue_handoff_fails_and_stays_in_quarantine() -> None:
    policy = make_policy()
    policy.handle(on.ReserveRequested(make_request()), now=0.0)
    assert policy.handle(on.Tick(), now=9.0) == []
    assert kinds(policy.handle(on.Tick(), now=10.0)) == ["SendFailure", "RevokeTicket", "ForgetRequest"]
    assert policy.handle(on.HandoffComplete("r", SampledToken(5)), now=11.0) == []
    assert policy.pool.num_used == 2
    policy.handle(on.WriterGone("r"), now=12.0)
    assert policy.pool.num_used == 0


def test_an_id_whose_blocks_are_in_quarantine_cannot_be_used_again_yet() -> None:
    policy = make_policy()
    policy.handle(on.ReserveRequested(make_request()), now=0.0)
    policy.handle(on.AbortRequested("r"), now=1.0)
    [failure] = policy.handle(on.ReserveRequested(make_request()), now=1.0)
    assert isinstance(failure, do.SendFailure)
    assert failure.code == "duplicate_request"
    policy.handle(on.WriterGone("r"), now=2.0)
    assert kinds(policy.handle(on.ReserveRequested(make_request()), now=3.0)) == ["GrantTicket"]


@pytest.mark.fault(49, 50)
def test_a_failed_step_fails_those_to_blame_and_repeats_the_rest() -> None:
    policy = make_policy()
    policy.handle(on.ServeRequested(make_request("a", num_tokens=3)), now=0.0)
    policy.handle(on.ServeRequested(make_request("b", num_tokens=3)), now=0.0)
    step(policy, 50)
    actions = policy.handle(on.StepFailed("engine_corrupt", "not finite", ("a",)), now=1.0)
    assert kinds(actions) == ["SendFailure", "ForgetRequest", "RunStep"]
    run = actions[-1]
    assert isinstance(run, do.RunStep)
    assert [row.sequence.request_id for row in run.batch.rows] == ["b"]
