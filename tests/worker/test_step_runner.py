"""What becomes of an engine's step, and of an engine that breaks down."""

from __future__ import annotations

import queue

import pytest

from diptych.core.actions import PushPages, RunStep
from diptych.core.errors import EngineCorrupt, EngineLost, ServingError
from diptych.core.events import RowsDropped, StepFailed, StepFinished
from diptych.core.fleet import ModelInfo
from diptych.core.kv_layout import KVLayout, KVMemory, PrivateMemory, SequenceKV
from diptych.core.ports import AllocateKV, OnLayer, OnLost, Unwanted
from diptych.core.request import Request, SampledToken
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.core.ticket import TicketClaims
from diptych.engine.scripted import ScriptedEngine, ScriptedModel, StepCost
from diptych.policy.resharding import plan_resharding
from diptych.worker.step_runner import StepRunner

LAYOUT = ScriptedModel(block_size=4).layout


class FailingEngine:
    """Fails every step in the same way."""

    model: ModelInfo = ScriptedModel().info
    layout: KVLayout = ScriptedModel().layout

    def __init__(self, error: Exception) -> None:
        self._error = error

    def allocate_kv(self, num_blocks: int, allocate: AllocateKV) -> tuple[KVMemory, ...]:
        return ()

    def step(
        self, batch: Batch, on_layer: OnLayer | None = None, unwanted: Unwanted | None = None
    ) -> list[SampledToken | None]:
        raise self._error

    def forget(self, request_id: str) -> None:
        raise self._error

    def watch(self, lost: OnLost) -> None: ...

    def close(self) -> None: ...


def batch_of(*prompts: tuple[str, int]) -> Batch:
    """Prompts of so many tokens, each in a block of its own."""
    rows = []
    for block, (name, num_tokens) in enumerate(prompts):
        sequence = Sequence.from_log(Request(request_id=name, prompt_token_ids=(65,) * num_tokens))
        sequence.block_table = [block]
        rows.append(ScheduledSequence(sequence, 0, num_tokens, samples=True))
    return Batch(tuple(rows))


def claims_for(sequence: Sequence) -> TicketClaims:
    return TicketClaims(
        request_id=sequence.request_id,
        worker_id="d0",
        epoch=1,
        blocks=(0,),
        first_block=0,
        num_tokens=sequence.num_tokens,
        layout=LAYOUT,
        model_digest="m",
        salt="",
        nonce=b"n" * 16,
    )


def stop(runner: StepRunner) -> None:
    runner.end()
    runner.join()


def outcome_of(error: Exception) -> object:
    """What a runner reports, or gives up with."""
    outcomes: queue.SimpleQueue[object] = queue.SimpleQueue()
    runner = StepRunner(FailingEngine(error), lambda *_: None, outcomes.put, outcomes.put)
    runner.start()
    runner.run(RunStep(Batch(())))
    outcome = outcomes.get(timeout=10)
    stop(runner)
    assert outcomes.empty()
    return outcome


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ServingError("why"), StepFailed("serving_failed", "why")),
        (ValueError("why"), StepFailed("engine_failed", "ValueError: why")),
    ],
)
def test_a_step_that_fails_is_reported(error: Exception, outcome: StepFailed) -> None:
    assert outcome_of(error) == outcome


def test_a_step_that_is_corrupt_names_its_requests() -> None:
    outcome = outcome_of(EngineCorrupt(("a", "b")))
    assert isinstance(outcome, StepFailed)
    assert (outcome.code, outcome.request_ids) == ("engine_corrupt", ("a", "b"))


def test_an_engine_that_is_lost_is_given_up() -> None:
    error = EngineLost("rank 1 has ended")
    assert outcome_of(error) is error


def test_an_engine_that_cannot_even_forget_is_given_up() -> None:
    """The thread lives on, but nothing that it says could be believed."""
    outcomes: queue.SimpleQueue[object] = queue.SimpleQueue()
    runner = StepRunner(FailingEngine(ValueError("why")), lambda *_: None, outcomes.put, outcomes.put)
    runner.start()
    runner.forget("r")
    outcome = outcomes.get(timeout=10)
    stop(runner)
    assert isinstance(outcome, EngineLost)
    assert outcome.message == "ValueError: why"


def slow_runner(cost: StepCost) -> tuple[StepRunner, queue.SimpleQueue[object], list[tuple[str, int]]]:
    """Over an engine that nobody could wake if it slept; with what it reports, and which layers of whom are pushed."""

    def sleep(seconds: float) -> None:
        raise AssertionError(f"nobody can wake it for {seconds} s")

    engine = ScriptedEngine(ScriptedModel(block_size=4), cost, sleep)
    engine.allocate_kv(4, PrivateMemory)
    outcomes: queue.SimpleQueue[object] = queue.SimpleQueue()
    pushed: list[tuple[str, int]] = []
    runner = StepRunner(engine, lambda push, layer: pushed.append((push.request_id, layer)), outcomes.put, outcomes.put)
    runner.start()
    return runner, outcomes, pushed


def test_a_step_without_rows_ends_at_once_and_the_next_one_does_not_hear_of_it() -> None:
    """Either would take hours."""
    runner, outcomes, _ = slow_runner(StepCost(step=0.0, token=3600.0, pair=0.0))
    step = RunStep(batch_of(("r", 3)))
    for _ in range(2):
        runner.run(step)
        runner.drop(("r",))
        assert outcomes.get(timeout=10) == RowsDropped(("r",))
        over = outcomes.get(timeout=10)
        assert isinstance(over, StepFinished)
        assert over.samples == (None,)
        runner.drop(("r",))  # too late
    stop(runner)
    assert outcomes.empty()


def test_pages_of_a_row_that_was_dropped_are_pushed_no_more() -> None:
    runner, outcomes, pushed = slow_runner(StepCost(step=0.0, token=0.0, pair=0.0))
    batch = batch_of(("stays", 3), ("leaves", 3))
    plan = plan_resharding(SequenceKV(LAYOUT, [0]), SequenceKV(LAYOUT, [0]), range(3))
    pushes = [PushPages(row.sequence.request_id, claims_for(row.sequence), plan) for row in batch.rows]
    runner.drop(("stays",))  # of the step before
    runner.run(RunStep(batch, tuple(pushes)))
    runner.drop(("leaves",))
    while not isinstance(outcome := outcomes.get(timeout=10), StepFinished):
        assert outcome == RowsDropped(("leaves",))
    stop(runner)
    assert outcome.samples[0] is not None
    assert [layer for name, layer in pushed if name == "stays"] == [0, 1]
    assert ("leaves", 1) not in pushed or outcome.samples[1] is not None


def test_who_ends_it_does_not_wait_for_the_end_of_a_step() -> None:
    runner, outcomes, _ = slow_runner(StepCost(step=3600.0))
    runner.run(RunStep(batch_of(("r", 3))))
    stop(runner)
    assert outcomes.get(timeout=10) == RowsDropped(("r",))
