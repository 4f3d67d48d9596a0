"""Rows that leave a running step: nothing of theirs is touched from then on, and the others do not notice."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_harness import Harness, expected_tokens, random_prompt

from diptych.core.kv_layout import KVLayout, PrivateMemory
from diptych.core.request import Request
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.engine.scripted import ScriptedEngine, ScriptedModel
from diptych.engine.torch_engine.dense_view import DenseView
from diptych.engine.torch_engine.plan import StepPlan, plan_step
from diptych.sim.unwanted import PlannedUnwanted

NUM_TOKENS = 6
LENGTHS = (20, 70, 90, 33, 1)


class Step:
    """Sequences of the usual lengths, the first of which decodes already, and their next step."""

    def __init__(self, dense_limit: int = 512 << 20) -> None:
        self.harness = Harness("llama", dense_limit=dense_limit)
        self.sequences = [self.harness.sequence(random_prompt(length), request_id=str(length)) for length in LENGTHS]
        self.harness.step((self.sequences[0], 20))
        self.harness.step((self.sequences[0], 1), (self.sequences[1], 33))
        for sequence in self.sequences:
            self.harness.make_room(sequence, sequence.num_tokens)
        self.batch = Batch(tuple(map(rest_of, self.sequences)))
        self.let_go: list[str] = []
        self.layers: list[int] = []

    def run(self, *unwanted: Sequence, layer: int) -> None:
        """Compute it, while these become unwanted before some layer; their blocks are poisoned when they are let go."""

        def let_go(request_ids: tuple[str, ...]) -> None:
            self.let_go += request_ids
            for sequence in self.sequences:
                if sequence.request_id in request_ids:
                    self.poison(sequence)

        planned = PlannedUnwanted([each.request_id for each in unwanted], layer, let_go)
        samples = self.harness.engine.step(self.batch, self.layers.append, planned)
        for row, token in zip(self.batch.rows, samples, strict=True):
            if row.sequence.request_id in self.let_go:
                assert token is None
                assert self.is_poisoned(row.sequence), "it was written to"
            else:
                assert token is not None
                row.sequence.num_computed_tokens = row.end
                row.sequence.token_ids.append(token.token_id)

    def check_others(self) -> None:
        staying = [each for each in self.sequences if each.request_id not in self.let_go]
        self.harness.generate(staying, NUM_TOKENS)
        for sequence in staying:
            prompt = list(sequence.request.prompt_token_ids)
            assert sequence.output_token_ids == expected_tokens("llama", prompt, NUM_TOKENS)

    def blocks(self, sequence: Sequence, layer: int) -> torch.Tensor:
        content = torch.frombuffer(self.harness.memory.layer(layer), dtype=torch.float32)
        return content.view(len(content) * 4 // self.harness.engine.layout.block_bytes, -1)[sequence.block_table]

    def poison(self, sequence: Sequence) -> None:
        for layer in range(self.harness.engine.layout.num_layers):
            content = torch.frombuffer(self.harness.memory.layer(layer), dtype=torch.float32)
            content.view(-1, self.harness.engine.layout.block_bytes // 4)[sequence.block_table] = torch.nan

    def is_poisoned(self, sequence: Sequence) -> bool:
        layers = range(self.harness.engine.layout.num_layers)
        return all(bool(self.blocks(sequence, layer).isnan().all()) for layer in layers)


def rest_of(sequence: Sequence) -> ScheduledSequence:
    """All that it lacks."""
    return ScheduledSequence(sequence, sequence.num_computed_tokens, sequence.num_uncomputed_tokens, samples=True)


@settings(deadline=None)
@given(
    shares=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9), st.booleans()), min_size=1, max_size=6),
    leaving=st.sets(st.integers(0, 5)),
)
def test_a_plan_without_rows_is_that_of_the_others(shares: list[tuple[int, int, bool]], leaving: set[int]) -> None:
    rows = []
    for number, (start, num_tokens, samples) in enumerate(shares):
        request = Request(request_id=str(number), prompt_token_ids=tuple(range(number, number + 30)))
        sequence = Sequence.from_log(request)
        sequence.block_table = list(range(8 * number, 8 * number + 8))
        rows.append(ScheduledSequence(sequence, start, num_tokens, samples))
    leaving = {number for number, row in enumerate(rows) if row.num_tokens > 1 and number in leaving}
    left = [number for number in range(len(rows)) if number not in leaving]
    plan, tokens = planned(rows).without(leaving)
    right = planned([rows[number] for number in left])
    for name in ("token_ids", "positions", "writes", "outputs"):
        assert getattr(plan, name).tolist() == getattr(right, name).tolist(), name
    assert plan.token_ids.tolist() == planned(rows).token_ids[tokens].tolist()
    assert list(plan.sampling) == [left[place] for place in right.sampling]
    assert [(chunk.tokens, chunk.start, chunk.samples, chunk.gather.tolist()) for chunk in plan.prefills] == [
        (chunk.tokens, chunk.start, chunk.samples, chunk.gather.tolist()) for chunk in right.prefills
    ]
    assert [chunk.row for chunk in plan.prefills] == [left[chunk.row] for chunk in right.prefills]


def planned(rows: list[ScheduledSequence]) -> StepPlan:
    layout = KVLayout(num_layers=1, num_kv_heads=2, head_dim=4, dtype="float32", block_size=4)
    view = DenseView(layout, torch.empty(0), limit=0)
    return plan_step(Batch(tuple(rows)), layout, view, torch.device("cpu"))


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("dense_limit", [0, 512 << 20])
@pytest.mark.parametrize("leaving", [(1,), (2,), (3,), (1, 2), (1, 2, 3)], ids=str)
def test_prompts_leave_and_the_others_have_the_right_tokens(
    leaving: tuple[int, ...], dense_limit: int, layer: int
) -> None:
    step = Step(dense_limit)
    step.run(*(step.sequences[index] for index in leaving), layer=layer)
    assert sorted(step.let_go) == sorted(str(LENGTHS[index]) for index in leaving)
    assert step.layers == [0, 1, 2]
    step.check_others()


def test_a_decode_stays_unless_it_is_among_the_last() -> None:
    step = Step()
    step.run(step.sequences[0], step.sequences[2], layer=1)
    assert step.let_go == ["90"]
    step.check_others()


@pytest.mark.parametrize("layer", range(3))
def test_a_step_of_nobody_ends_at_once(layer: int) -> None:
    step = Step()
    step.run(*step.sequences, layer=layer)
    assert sorted(step.let_go) == sorted(map(str, LENGTHS))
    assert step.layers == list(range(layer))


def test_rows_may_leave_one_after_the_other() -> None:
    class OneByOne(PlannedUnwanted):
        def take(self) -> frozenset[str]:
            return frozenset({left.pop(0)} if left else ())

    step = Step()
    left = ["90", "70", "33"]
    generator = random.Random(0)
    generator.shuffle(left)
    samples = step.harness.engine.step(step.batch, None, OneByOne(()))
    assert [token is not None for token in samples] == [True, False, False, False, True]


def test_what_comes_after_the_last_layer_is_too_late() -> None:
    step = Step()
    step.run(step.sequences[1], layer=3)
    assert step.let_go == []
    step.check_others()


def test_the_scripted_engine_leaves_rows_out_too() -> None:
    engine = ScriptedEngine(ScriptedModel(num_layers=4))
    [memory] = engine.allocate_kv(2, PrivateMemory)
    rows = []
    for block in range(2):
        sequence = Sequence.from_log(Request(request_id=str(block), prompt_token_ids=(65, 66)))
        sequence.block_table = [block]
        rows.append(ScheduledSequence(sequence, 0, 2, samples=True))
    [right, _] = engine.step(Batch(tuple(rows)))
    memory.buffer[:] = bytes(len(memory.buffer))
    layers: list[int] = []
    assert engine.step(Batch(tuple(rows)), layers.append, PlannedUnwanted(["1"], 2)) == [right, None]
    size = engine.layout.block_bytes
    assert [any(memory.layer(layer)[size:]) for layer in range(4)] == [True, True, False, False]
    assert layers == [0, 1, 2, 3]
    assert engine.step(Batch(tuple(rows)), layers.append, PlannedUnwanted(["0", "1"], 1)) == [None, None]
    assert layers == [0, 1, 2, 3, 0]
