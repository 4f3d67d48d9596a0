"""Data-parallel ranks in one worker: who takes what, common steps, and what is told to others."""

from __future__ import annotations

from diptych.core import actions as do
from diptych.core import events as on
from diptych.core.request import Request, SampledToken, SamplingParams
from diptych.core.settings import ParallelSettings
from diptych.engine.scripted import ScriptedModel
from diptych.policy.batching import BatchLimits
from diptych.policy.block_pool import BlockPool
from diptych.policy.data_parallel import DataParallelPolicy
from diptych.policy.worker import WorkerPolicy

LAYOUT = ScriptedModel(block_size=4, parallel=ParallelSettings(data=2)).layout


def make_policy(num_blocks: int = 16, max_sequences: int = 4) -> DataParallelPolicy:
    limits = BatchLimits(max_batch_tokens=8, max_sequences=max_sequences)
    return DataParallelPolicy(
        [WorkerPolicy(LAYOUT, BlockPool(num_blocks, 4), limits, (0,), data_rank=rank) for rank in range(2)]
    )


def make_request(name: str, prompt: range = range(1, 7), max_tokens: int = 3) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Request(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling)


def serve(policy: DataParallelPolicy, name: str, prompt: range = range(1, 7)) -> list[do.WorkerAction]:
    return policy.handle(on.ServeRequested(make_request(name, prompt)), now=0.0)


def rows(action: do.WorkerAction) -> list[tuple[str, int]]:
    """Request and data-parallel rank of each row of a step."""
    assert isinstance(action, do.RunStep)
    return [(row.sequence.request_id, row.sequence.data_rank) for row in action.batch.rows]


def step(policy: DataParallelPolicy, *tokens: int) -> list[do.WorkerAction]:
    return policy.handle(on.StepFinished(tuple(map(SampledToken, tokens)), seconds=0.5), now=1.0)


def run_to_end(policy: DataParallelPolicy, action: do.WorkerAction) -> None:
    while isinstance(action, do.RunStep):
        *_, action = step(policy, *([50] * len(action.batch.rows)))
    assert policy.idle


def test_two_requests_run_on_two_ranks_in_one_step() -> None:
    policy = make_policy()
    [run] = serve(policy, "a")
    assert rows(run) == [("a", 0)]
    assert serve(policy, "b") == []  # a step runs: it waits for its end, as rank 1 does
    *_, run = step(policy, 50)
    assert rows(run) == [("a", 0), ("b", 1)]
    tokens, first, run = step(policy, 51, 60)
    assert isinstance(tokens, do.SendTokens)
    assert [(output.request_id, output.token.token_id) for output in tokens.outputs] == [("a", 51)]
    assert isinstance(first, do.SendFirstToken)
    assert (first.output.request_id, first.output.token.token_id) == ("b", 60)
    assert policy.stats().running == 2
    policy.check_integrity()
    run_to_end(policy, run)


def test_a_prefix_is_looked_for_where_it_is() -> None:
    policy = make_policy()
    for name, prompt in (("a", range(1, 14)), ("b", range(101, 114))):
        run_to_end(policy, serve(policy, name, prompt)[-1])
    assert [rank.pool.num_cached for rank in policy.ranks] == [3, 3]
    for name, prompt, rank in (("c", range(101, 118), 1), ("d", range(1, 18), 0)):
        [run] = serve(policy, name, prompt)
        assert rows(run) == [(name, rank)]
        run_to_end(policy, run)


def test_a_short_common_prefix_does_not_send_everybody_to_one_rank() -> None:
    policy = make_policy(num_blocks=64)
    run_to_end(policy, serve(policy, "first", range(1, 7))[-1])
    for number in range(6):
        serve(policy, f"r{number}", range(1, 7 + number))
    assert [len(rank.request_ids) for rank in policy.ranks] == [3, 3]


def test_events_find_their_request_and_an_id_is_used_once() -> None:
    policy = make_policy()
    grants = [policy.handle(on.ReserveRequested(make_request(name)), now=0.0) for name in "ab"]
    assert [[(grant.data_rank, grant.blocks) for grant in found] for found in grants] == [[(0, (0, 1))], [(1, (0, 1))]]
    [failure] = policy.handle(on.ServeRequested(make_request("b")), now=0.0)
    assert isinstance(failure, do.SendFailure)
    assert failure.code == "duplicate_request"
    assert rows(policy.handle(on.HandoffComplete("b", SampledToken(50)), now=0.0)[0]) == [("b", 1)]
    assert do.RevokeTicket("a") in policy.handle(on.AbortRequested("a"), now=0.0)
    for late in (on.PushAccepted("x"), on.WriterGone("x"), on.AbortRequested("x"), on.LinkLost("d0", ("x", "y"))):
        assert policy.handle(late, now=0.0) == []
    policy.handle(on.WriterGone("a"), now=0.0)
    assert policy.request_ids == ("b",)


def test_a_failed_step_fails_those_to_blame_on_any_rank_and_repeats_the_rest() -> None:
    policy = make_policy()
    for name, prompt in (("a", range(1, 4)), ("b", range(11, 17)), ("c", range(21, 24))):
        serve(policy, name, prompt)
    *_, run = step(policy, 50)
    assert rows(run) == [("a", 0), ("c", 0), ("b", 1)]
    assert policy.handle(on.AbortRequested("b"), now=1.0) == [do.DropRow("b")]  # in the running step: later
    actions = policy.handle(on.StepFailed("engine_corrupt", "not finite", ("c",)), now=1.0)
    assert [type(action).__name__ for action in actions] == ["SendFailure", "ForgetRequest", "ForgetRequest", "RunStep"]
    assert rows(actions[-1]) == [("a", 0)]
    actions = policy.handle(on.StepFailed("engine_failed", "everything"), now=1.0)
    assert [type(action).__name__ for action in actions] == ["SendFailure", "ForgetRequest"]
    assert policy.idle


def test_a_row_is_dropped_on_its_rank_and_the_common_step_goes_on() -> None:
    policy = make_policy()
    for name, prompt in (("a", range(1, 6)), ("b", range(11, 17)), ("c", range(21, 24))):
        serve(policy, name, prompt)
    *_, run = step(policy, 50)
    assert rows(run) == [("a", 0), ("b", 1), ("c", 1)]
    assert policy.handle(on.AbortRequested("b"), now=1.0) == [do.DropRow("b")]
    assert policy.handle(on.RowsDropped(("b",)), now=1.0) == [do.ForgetRequest("b")]
    policy.check_integrity()
    assert "b" not in policy.request_ids
    before = policy.rates.prefill_rate
    *_, run = policy.handle(on.StepFinished((SampledToken(51), None, None), seconds=0.5), now=1.0)
    assert rows(run) == [("a", 0), ("c", 1)]
    assert (policy.stats().rows_dropped, policy.rates.prefill_rate) == (1, before)


def test_a_block_is_here_as_long_as_one_rank_has_it() -> None:
    policy = make_policy(num_blocks=2)
    policy.handle(on.ServeRequested(make_request("a", range(1, 5), 1)), now=0.0)
    policy.handle(on.ServeRequested(make_request("b", range(1, 5), 1)), now=0.0)
    *_, run = step(policy, 50)
    stored, evicted = policy.drain_cache_events()
    assert (len(stored), evicted) == (1, [])
    step(policy, 50)
    assert policy.drain_cache_events() == ([], [])  # rank 1 has it, too
    policy.ranks[0].pool.clear_cache()
    assert policy.drain_cache_events() == ([], [])
    policy.ranks[1].pool.clear_cache()
    assert policy.drain_cache_events() == ([], stored)


def test_rates_are_those_of_the_common_steps() -> None:
    policy = make_policy()
    serve(policy, "a")
    serve(policy, "b")
    step(policy, 50)
    step(policy, 51, 60)
    step(policy, 52, 61)
    assert policy.stats().decode_step_seconds == 0.5
    assert policy.stats().blocks_used == sum(rank.stats().blocks_used for rank in policy.ranks) > 0
