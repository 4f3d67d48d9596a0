"""The scripted engine cut into ranks: the cut changes nothing, and every byte of every rank matters."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.kv_layout import KVMemory, PrivateMemory
from diptych.core.request import Request, SamplingParams
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.core.settings import ParallelSettings
from diptych.engine.scripted import HEAD_FORMATS, ScriptedEngine, ScriptedModel, expected_tokens

GREEDY = SamplingParams(temperature=0.0)
PROMPT = list(range(40, 49))
NUM_BLOCKS = 6


def cuts(num_layers: int = 3) -> st.SearchStrategy[ParallelSettings]:
    return st.builds(
        lambda tensor, pipeline, data, spread: ParallelSettings(
            tensor=tensor, pipeline=pipeline, data=data, expert=tensor * data if spread else 1
        ),
        st.sampled_from([1, 2, 4, 8]),
        st.integers(1, num_layers),
        st.integers(1, 3),
        st.booleans(),
    )


def started(model: ScriptedModel) -> tuple[ScriptedEngine, tuple[KVMemory, ...]]:
    engine = ScriptedEngine(model)
    return engine, engine.allocate_kv(NUM_BLOCKS, PrivateMemory)


def generate(engine: ScriptedEngine, sequence: Sequence, count: int) -> list[int]:
    for _ in range(count):
        start = sequence.num_computed_tokens
        row = ScheduledSequence(sequence, start, sequence.num_uncomputed_tokens, samples=True)
        [token] = engine.step(Batch((row,)))
        assert token is not None
        sequence.num_computed_tokens = row.end
        sequence.token_ids.append(token.token_id)
    return sequence.output_token_ids


def sequence_on(data_rank: int, blocks: list[int]) -> Sequence:
    request = Request(request_id="r", prompt_token_ids=tuple(PROMPT), sampling=GREEDY)
    sequence = Sequence.from_log(request)
    sequence.block_table, sequence.data_rank = blocks, data_rank
    return sequence


@settings(deadline=None)
@given(cut=cuts(), num_heads=st.sampled_from(sorted(HEAD_FORMATS)), data=st.data())
def test_no_cut_changes_the_answer(cut: ParallelSettings, num_heads: int, data: st.DataObject) -> None:
    model = ScriptedModel(block_size=4, num_layers=3, num_kv_heads=num_heads, parallel=cut)
    engine, memories = started(model)
    assert [memory.rank for memory in memories] == list(range(cut.world_size))
    data_rank = data.draw(st.integers(0, cut.data - 1))
    whole = replace(model, parallel=ParallelSettings())
    right = expected_tokens(PROMPT, 8, GREEDY, whole)
    assert generate(engine, sequence_on(data_rank, [3, 0, 5, 1, 2]), 8) == right
    assert model.info == whole.info
    written = {memory.rank for memory in memories if any(memory.buffer)}
    per_data_rank = cut.tensor * cut.pipeline
    assert written == set(range(data_rank * per_data_rank, (data_rank + 1) * per_data_rank))


@settings(deadline=None)
@given(cut=cuts(), data=st.data())
def test_every_valid_byte_of_every_rank_matters_and_no_other(cut: ParallelSettings, data: st.DataObject) -> None:
    """Flip one byte of the KV between two tokens, also where another rank holds the same."""
    model = ScriptedModel(block_size=4, num_layers=3, parallel=cut)
    engine, memories = started(model)
    sequence = sequence_on(0, [3, 0, 5, 1])
    generate(engine, sequence, 1)
    memory = memories[data.draw(st.integers(0, cut.world_size - 1))]
    position = data.draw(st.integers(0, memory.buffer.nbytes - 1))
    memory.buffer[position] ^= data.draw(st.integers(1, 255))
    layout = model.layout
    block = position // layout.block_bytes % NUM_BLOCKS
    slot = position // layout.vector_bytes % 4
    mine = memory.rank < cut.tensor * cut.pipeline
    valid = mine and (block in (3, 0) or (block == 5 and slot < 1))
    # a wrong checksum may lead to the same token (1 in 95), hardly to the same seven
    assert (generate(engine, sequence, 7) == expected_tokens(PROMPT, 8, GREEDY, model)) == (not valid)


@pytest.mark.parametrize("num_heads", [2, 4, 8])
def test_heads_differ(num_heads: int) -> None:
    """Or else a head in the place of another would not be found out."""
    model = ScriptedModel(block_size=4, num_layers=3, num_kv_heads=num_heads)
    engine, [memory] = started(model)
    generate(engine, sequence_on(0, [0, 1, 2]), 1)
    for layer in range(3):
        pages = bytes(memory.layer(layer))
        size = 4 * model.layout.vector_bytes
        vectors = [pages[start : start + size] for start in range(0, 2 * model.layout.block_bytes, size)]
        assert len(set(vectors)) == len(vectors)


def test_a_cut_that_does_not_come_out_even_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be cut evenly"):
        ScriptedEngine(ScriptedModel(num_kv_heads=4, parallel=ParallelSettings(tensor=3)))
