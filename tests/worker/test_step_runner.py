"""What becomes of an engine's step, and of an engine that breaks down."""

from __future__ import annotations

import queue

import pytest

from diptych.core.actions import RunStep
from diptych.core.errors import EngineCorrupt, EngineLost, ServingError
from diptych.core.events import StepFailed, StepFinished, StepGivenUp
from diptych.core.fleet import ModelInfo
from diptych.core.kv_layout import KVLayout, KVMemory, PrivateMemory
from diptych.core.ports import AllocateKV, Flag, OnLayer, OnLost
from diptych.core.request import Request, SampledToken
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.engine.scripted import ScriptedEngine, ScriptedModel, StepCost
from diptych.worker.step_runner import StepRunner


class FailingEngine:
    """Fails every step in the same way."""

    model: ModelInfo = ScriptedModel().info
    layout: KVLayout = ScriptedModel().layout

    def __init__(self, error: Exception) -> None:
        self._error = error

    def allocate_kv(self, num_blocks: int, allocate: AllocateKV) -> tuple[KVMemory, ...]:
        return ()

    def step(
        self, batch: Batch, on_layer: OnLayer | None = None, given_up: Flag | None = None
    ) -> list[SampledToken | None]:
        raise self._error

    def forget(self, request_id: str) -> None:
        raise self._error

    def watch(self, lost: OnLost) -> None: ...

    def close(self) -> None: ...


def one_row(num_tokens: int) -> Batch:
    sequence = Sequence.from_log(Request(request_id="r", prompt_token_ids=(65,) * num_tokens))
    sequence.block_table = [0]
    return Batch((ScheduledSequence(sequence, 0, num_tokens, samples=True),))


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


def test_a_step_that_is_given_up_ends_at_once_and_the_next_one_does_not_hear_of_it() -> None:
    """The first step would take an hour."""

    def sleep(seconds: float) -> None:
        raise AssertionError("nobody could wake it")

    cost = StepCost(step=0.0, token=3600.0, pair=0.0)
    engine = ScriptedEngine(ScriptedModel(block_size=4), cost, sleep)
    engine.allocate_kv(4, PrivateMemory)
    outcomes: queue.SimpleQueue[object] = queue.SimpleQueue()
    layers: list[int] = []
    runner = StepRunner(engine, lambda step, layer: layers.append(layer), outcomes.put, outcomes.put)
    runner.start()
    runner.run(RunStep(one_row(3)))
    runner.give_up()
    assert outcomes.get(timeout=10) == StepGivenUp()
    assert layers == []
    runner.give_up()
    runner.run(RunStep(Batch(())))
    assert isinstance(outcomes.get(timeout=10), StepFinished)
    stop(runner)


def test_who_stops_does_not_wait_for_the_end_of_a_step() -> None:
    cost = StepCost(step=3600.0)
    engine = ScriptedEngine(ScriptedModel(block_size=4), cost, lambda seconds: None)
    engine.allocate_kv(4, PrivateMemory)
    outcomes: queue.SimpleQueue[object] = queue.SimpleQueue()
    runner = StepRunner(engine, lambda *_: None, outcomes.put, outcomes.put)
    runner.start()
    runner.run(RunStep(one_row(3)))
    stop(runner)
    assert outcomes.get(timeout=10) == StepGivenUp()
