"""The dense view is a copy: whatever happens to a batch, its tokens are those of the plain gather path."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_harness import Harness, expected_tokens, random_prompt

from diptych.core.blocks import blocks_for
from diptych.core.errors import EngineCorrupt
from diptych.core.kv_layout import KVLayout
from diptych.core.request import Request, SamplingParams
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.engine.torch_engine.dense_view import DenseView, Resident, size_for

LOGPROBS = SamplingParams(temperature=0.0, logprobs=509)
ROOMY = 512 << 20
TWO_SLOTS = 110_000  # bytes: of the llama checkpoint, two slots of 64 tokens or one of 128
LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32", block_size=16)


class Twins:
    """The same steps in an engine with a dense view and in one that gathers; they must agree on every logprob."""

    def __init__(self, dense_limit: int = ROOMY) -> None:
        self.sides = (Harness("llama", dense_limit=dense_limit), Harness("llama", dense_limit=0))
        self.pairs: list[tuple[Sequence, Sequence]] = []

    def add(self, length: int) -> int:
        """The number of a new sequence with a random prompt."""
        number = len(self.pairs)
        prompt = random_prompt(length, seed=number)
        dense, plain = (side.sequence(prompt, LOGPROBS, f"{number}") for side in self.sides)
        self.pairs.append((dense, plain))
        return number

    def step(self, *numbers: int, limit: int = 4096) -> None:
        """Compute up to `limit` tokens of each of these sequences."""
        answers = [
            side.step(*((self.pairs[number][index], limit) for number in numbers))
            for index, side in enumerate(self.sides)
        ]
        for dense, plain in zip(*answers, strict=True):
            assert (dense is None) == (plain is None)
            if dense is not None and plain is not None:
                assert dense.token_id == plain.token_id
                found, wanted = dict(dense.top_logprobs), dict(plain.top_logprobs)
                assert max(abs(found[token] - wanted[token]) for token in wanted) < 1e-4

    def preempt(self, number: int) -> None:
        for side, sequence in zip(self.sides, self.pairs[number], strict=True):
            side.preempt(sequence)

    def finish(self, number: int) -> None:
        self.preempt(number)
        for side, sequence in zip(self.sides, self.pairs[number], strict=True):
            side.engine.forget(sequence.request_id)

    def check(self) -> None:
        """All tokens so far are those of `transformers`."""
        for dense in [dense for dense, _ in self.pairs if dense.num_output_tokens]:
            wanted = expected_tokens("llama", dense.token_ids[: dense.num_prompt_tokens], dense.num_output_tokens)
            assert dense.output_token_ids[: len(wanted)] == wanted


def decode(harness: Harness, *sequences: Sequence) -> None:
    harness.step(*((sequence, 1) for sequence in sequences))


def poison(harness: Harness, sequence: Sequence) -> None:
    """Fill all its blocks with NaN."""
    size = harness.engine.layout.block_bytes
    for layer in range(harness.engine.layout.num_layers):
        for block in sequence.block_table:
            harness.memory.layer(layer)[block * size : (block + 1) * size] = b"\xff" * size


def test_a_context_is_gathered_once() -> None:
    harness, prompt = Harness("llama"), random_prompt(50)
    sequence = harness.sequence(prompt)
    harness.step((sequence, 50))
    decode(harness, sequence)
    poison(harness, sequence)
    for _ in range(6):
        decode(harness, sequence)
    assert sequence.output_token_ids == expected_tokens("llama", prompt, 8)


def test_without_memory_every_step_gathers() -> None:
    harness = Harness("llama", dense_limit=0)
    sequence = harness.sequence(random_prompt(50))
    harness.step((sequence, 50))
    decode(harness, sequence)
    poison(harness, sequence)
    with pytest.raises(EngineCorrupt):
        decode(harness, sequence)


def test_a_context_outgrows_its_slot_and_its_buffer() -> None:
    twins = Twins()
    first, second = twins.add(45), twins.add(120)
    for _ in range(70):
        twins.step(first, second)
    twins.check()


@pytest.mark.parametrize("dense_limit", [ROOMY, TWO_SLOTS, 5 * TWO_SLOTS])
def test_joins_leaves_and_another_order(dense_limit: int) -> None:
    twins = Twins(dense_limit)
    a, b, c, d, e = (twins.add(length) for length in (30, 33, 61, 20, 200))
    for numbers in ([a], [a, b], [c, b, a], [c, a, b], [a, b], [b, c], [d, c, b], [e, d, a], [e, d, a], [d], [a, b, c]):
        for _ in range(2):
            twins.step(*numbers)
    twins.check()


@pytest.mark.parametrize("seed", range(4))
def test_random_histories(seed: int) -> None:
    """Chunks, decodes, preemptions and ends of few sequences and many, in any order."""
    generator = random.Random(seed)
    twins = Twins(generator.choice((ROOMY, TWO_SLOTS, 5 * TWO_SLOTS)))
    running = [twins.add(length) for length in (5, 17, 40, 62, 90)]
    for _ in range(40):
        chosen = [number for number in running if generator.random() < 0.85]
        generator.shuffle(chosen)
        twins.step(*chosen, limit=generator.choice((1, 16, 100)))
        if generator.random() < 0.15:
            twins.preempt(generator.choice(running))
        if generator.random() < 0.1:
            twins.finish(running.pop(0))
            running.append(twins.add(generator.randrange(1, 100)))
    twins.check()


def test_a_preempted_sequence_returns_to_other_blocks() -> None:
    twins = Twins()
    stays, leaves = twins.add(40), twins.add(35)
    for _ in range(3):
        twins.step(stays, leaves)
    before = list(twins.pairs[leaves][0].block_table)
    twins.preempt(leaves)
    for _ in range(2):
        twins.step(stays)
    for _ in range(4):
        twins.step(stays, leaves)
    assert twins.pairs[leaves][0].block_table[: len(before)] != before
    twins.check()


def test_other_blocks_between_two_steps_are_noticed() -> None:
    """Preempted and back at once, its prefix shared: the same sequence at the same position, elsewhere."""
    harness, prompt = Harness("llama"), random_prompt(50)
    sequence, other = harness.sequence(prompt), harness.sequence(random_prompt(50, seed=1))
    harness.step((sequence, 50), (other, 50))
    decode(harness, sequence, other)
    sequence.block_table, other.block_table = other.block_table, sequence.block_table
    decode(harness, sequence)
    # The second decode saw the other's context, as a gather does.
    assert sequence.output_token_ids != expected_tokens("llama", prompt, 3)


def test_only_the_next_token_or_the_same_again_continues_a_context() -> None:
    sequence = Sequence.from_log(Request(request_id="0", prompt_token_ids=(0,) * 60, sampling=LOGPROBS))
    sequence.block_table = [7, 3, 9, 4]
    resident = Resident(slot=0, end=40, blocks=[7, 3, 9])
    starts = [start for start in range(60) if resident.continues(ScheduledSequence(sequence, start, 1, False))]
    assert starts == [39, 40]


def test_a_prompt_in_chunks_beside_decodes() -> None:
    twins = Twins()
    decoding = [twins.add(length) for length in (10, 33)]
    twins.step(*decoding)
    long = twins.add(130)
    for _ in range(10):
        twins.step(*decoding, long, limit=16)
    twins.check()


def test_a_step_may_be_repeated() -> None:
    harness, prompts = Harness("llama"), [random_prompt(20), random_prompt(62)]
    sequences = [harness.sequence(prompt) for prompt in prompts]
    harness.step(*((sequence, 100) for sequence in sequences))
    for _ in range(4):
        for sequence in sequences:  # room for the rows below, which the harness does not step
            harness.make_room(sequence, sequence.num_tokens)
        rows = tuple(ScheduledSequence(each, each.num_computed_tokens, 1, True) for each in sequences)
        first = harness.engine.step(Batch(rows))
        assert harness.engine.step(Batch(rows[::-1]))[::-1] == first
        decode(harness, *sequences)
    assert [each.output_token_ids for each in sequences] == [expected_tokens("llama", each, 5) for each in prompts]


def test_a_step_that_fails_half_way_leaves_nothing_half_written() -> None:
    harness, prompts = Harness("llama"), [random_prompt(20), random_prompt(30)]
    sequences = [harness.sequence(prompt) for prompt in prompts]
    harness.step(*((sequence, 100) for sequence in sequences))

    def fail(layer: int) -> None:
        if layer == 1:
            raise RuntimeError("the link is gone")

    for _ in range(3):
        with pytest.raises(RuntimeError):
            harness.step(*((sequence, 1) for sequence in sequences), on_layer=fail)
        decode(harness, *sequences)
        decode(harness, *sequences[::-1])
    assert [each.output_token_ids for each in sequences] == [expected_tokens("llama", each, 7) for each in prompts]


def test_a_corrupt_context_spoils_neither_neighbours_nor_its_slots_next_owner() -> None:
    harness = Harness("llama")
    prompts = [random_prompt(62), random_prompt(30), random_prompt(5)]
    corrupt, neighbour, heir = (harness.sequence(prompt) for prompt in prompts)
    harness.step((corrupt, 100), (neighbour, 100), (heir, 100))
    poison(harness, corrupt)
    with pytest.raises(EngineCorrupt) as caught:
        decode(harness, corrupt, neighbour)
    assert caught.value.request_ids == (corrupt.request_id,)
    for _ in range(4):
        decode(harness, heir, neighbour)
    for sequence, prompt in ((heir, prompts[2]), (neighbour, prompts[1])):
        assert sequence.output_token_ids == expected_tokens("llama", prompt, 5)


def test_a_log_moves_between_two_engines_that_both_decode() -> None:
    engines = (Harness("llama"), Harness("llama"))
    prompts = [random_prompt(40, seed=seed) for seed in range(3)]
    locals_ = [harness.sequence(prompt) for harness, prompt in zip(engines, prompts, strict=False)]
    moving = engines[0].sequence(prompts[2])
    for harness, sequence in zip(engines, locals_, strict=True):
        harness.step((sequence, 40))
    engines[0].step((moving, 40))
    for turn in range(4):
        here, there = engines[turn % 2], engines[1 - turn % 2]
        for _ in range(2):
            decode(here, locals_[turn % 2], moving)
            decode(there, locals_[1 - turn % 2])
        moved = Sequence.from_log(moving.request, tuple(moving.output_token_ids))
        moved.num_computed_tokens = moving.num_computed_tokens
        there.make_room(moved, moving.num_computed_tokens)
        size = here.engine.layout.block_bytes
        for layer in range(here.engine.layout.num_layers):
            source, target = here.memory.layer(layer), there.memory.layer(layer)
            for old, new in zip(moving.block_table, moved.block_table, strict=True):
                target[new * size : (new + 1) * size] = source[old * size : (old + 1) * size]
        here.preempt(moving)
        moving = moved
    for sequence, prompt in zip((*locals_, moving), prompts, strict=True):
        assert sequence.output_token_ids == expected_tokens("llama", prompt, 9)


class Watched(Sequence):
    """A sequence whose end can be observed."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize("forgotten", [True, False])
def test_finished_sequences_are_let_go(forgotten: bool) -> None:
    """By `forget`, or at the latest by the next step."""
    harness = Harness("llama")
    request = Request(request_id="ends", prompt_token_ids=tuple(random_prompt(20)), sampling=LOGPROBS)
    ends, goes_on = Watched.from_log(request), harness.sequence(random_prompt(21))
    harness.step((ends, 20), (goes_on, 21))
    decode(harness, ends, goes_on)
    seen = weakref.ref(ends)
    del ends
    gc.collect()
    assert seen() is not None
    if forgotten:
        harness.engine.forget("ends")
    else:
        decode(harness, goes_on)
    gc.collect()
    assert seen() is None


@given(st.integers(1, 1 << 20))
def test_sizes_are_few_and_padding_stays_below_half(num_tokens: int) -> None:
    size = size_for(num_tokens)
    assert size >= num_tokens
    assert size == 64 or size < 1.5 * num_tokens
    assert size_for(size) == size
    assert size.bit_count() <= 2


BATCHES = st.lists(st.lists(st.integers(0, 11), unique=True, min_size=1, max_size=12), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 700), min_size=12, max_size=12), BATCHES, st.integers(0, 400_000))
def test_slots_are_disjoint_and_memory_is_bounded(lengths: list[int], batches: list[list[int]], limit: int) -> None:
    view = DenseView(LAYOUT, torch.empty(0), limit)
    sequences = []
    for number, length in enumerate(lengths):
        request = Request(request_id=str(number), prompt_token_ids=(0,) * length, sampling=LOGPROBS)
        sequences.append(Sequence.from_log(request))
        sequences[-1].num_computed_tokens = length - 1
        sequences[-1].block_table = [0] * blocks_for(length + len(batches), LAYOUT.block_size)
    for numbers in batches:
        rows = [ScheduledSequence(sequences[each], sequences[each].num_computed_tokens, 1, True) for each in numbers]
        placed, homeless = view.place(rows)
        seen = [row.sequence.request_id for contexts in placed for row in contexts.rows]
        seen += [row.sequence.request_id for row in homeless]
        assert sorted(seen) == sorted(str(number) for number in numbers)
        assert sum(contexts.buffer.nbytes for contexts in placed) <= limit
        for contexts in placed:
            assert len(contexts.rows) <= contexts.buffer.num_slots
            assert max(row.end for row in contexts.rows) <= contexts.buffer.capacity
            contexts.keep()
        for row in rows:
            row.sequence.num_computed_tokens += 1
