"""The scripted engine: right KV gives the expected tokens, any wrong byte does not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.errors import ServingError
from diptych.core.kv_layout import KVMemory, PrivateMemory
from diptych.core.ports import Engine
from diptych.core.request import Request, SampledToken, SamplingParams
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.engine.scripted import (
    EOS_TOKEN_ID,
    ScriptedEngine,
    ScriptedModel,
    StepCost,
    expected_tokens,
)

GREEDY = SamplingParams(temperature=0.0)


def started(model: ScriptedModel, num_blocks: int) -> tuple[Engine, KVMemory]:
    engine = ScriptedEngine(model)
    [memory] = engine.allocate_kv(num_blocks, PrivateMemory)
    return engine, memory


def sequence_of(prompt: list[int], sampling: SamplingParams = GREEDY, blocks: list[int] | None = None) -> Sequence:
    sequence = Sequence.from_log(Request(request_id="r", prompt_token_ids=tuple(prompt), sampling=sampling))
    sequence.block_table = blocks or []
    return sequence


def compute(engine: Engine, sequence: Sequence, num_tokens: int) -> SampledToken | None:
    """One step of one sequence, as a scheduler would have it."""
    start = sequence.num_computed_tokens
    samples = start + num_tokens == sequence.num_tokens
    [token] = engine.step(Batch((ScheduledSequence(sequence, start, num_tokens, samples),)))
    sequence.num_computed_tokens += num_tokens
    return token


def generate(engine: Engine, sequence: Sequence, count: int) -> list[int]:
    for _ in range(count):
        token = compute(engine, sequence, sequence.num_uncomputed_tokens)
        assert token is not None
        sequence.token_ids.append(token.token_id)
    return sequence.output_token_ids


@settings(deadline=None)
@given(
    prompt=st.lists(st.integers(0, 255), min_size=1, max_size=40),
    chunks=st.lists(st.integers(1, 9), max_size=6),
    block_size=st.integers(1, 9),
    blocks=st.permutations(range(50)),
    seed=st.integers(0, 3),
)
def test_any_paging_and_chunking_gives_the_expected_tokens(
    prompt: list[int], chunks: list[int], block_size: int, blocks: list[int], seed: int
) -> None:
    sampling = SamplingParams(temperature=float(seed > 0), seed=seed)
    engine, _ = started(ScriptedModel(block_size=block_size), num_blocks=50)
    sequence = sequence_of(prompt, sampling, blocks)
    for chunk in chunks:
        if chunk < sequence.num_uncomputed_tokens:
            assert compute(engine, sequence, chunk) is None
    assert generate(engine, sequence, 8) == expected_tokens(prompt, 8, sampling)


@given(data=st.data())
@settings(deadline=None)
def test_every_valid_byte_matters_and_no_other(data: st.DataObject) -> None:
    """Flip one byte of the KV between two tokens."""
    engine, kv = started(ScriptedModel(block_size=4), num_blocks=6)
    sequence = sequence_of(list(range(40, 49)), blocks=[3, 0, 5, 1])
    generate(engine, sequence, 1)
    position = data.draw(st.integers(0, kv.buffer.nbytes - 1))
    kv.buffer[position] ^= data.draw(st.integers(1, 255))
    block, slot = position // 64 % 6, position // 4 % 4  # two heads of four bytes
    valid = block in (3, 0) or (block == 5 and slot < 1)
    # a wrong checksum may lead to the same token (1 in 95), hardly to the same seven
    assert (generate(engine, sequence, 7) == expected_tokens(range(40, 49), 8)) == (not valid)


def test_another_sequences_page_gives_other_tokens() -> None:
    engine, _ = started(ScriptedModel(block_size=4), num_blocks=6)
    generate(engine, sequence_of([70] * 8, blocks=[4, 5]), 1)
    sequence = sequence_of([65] * 8, blocks=[0, 1, 2])
    generate(engine, sequence, 1)
    assert generate(engine, sequence, 1) == expected_tokens([65] * 8, 2)
    sequence.block_table[0] = 4
    assert generate(engine, sequence, 3) != expected_tokens([65] * 8, 5)


def test_rows_of_a_batch_do_not_mix() -> None:
    engine, _ = started(ScriptedModel(block_size=4), num_blocks=9)
    one, other = sequence_of([65] * 6, blocks=[0, 2]), sequence_of([66] * 9, blocks=[1, 3, 5])
    rows = (ScheduledSequence(one, 0, 6, samples=True), ScheduledSequence(other, 0, 8, samples=False))
    token, nothing = engine.step(Batch(rows))
    assert nothing is None
    assert token is not None
    assert [token.token_id] == expected_tokens([65] * 6, 1)
    other.num_computed_tokens = 8
    assert generate(engine, other, 3) == expected_tokens([66] * 9, 3)


def test_layers_are_reported_in_order_once_written() -> None:
    model = ScriptedModel(block_size=4, num_layers=3)
    engine, kv = started(model, num_blocks=2)
    seen: list[tuple[int, list[bool]]] = []
    row = ScheduledSequence(sequence_of([65] * 5, blocks=[1, 0]), 0, 5, samples=True)
    engine.step(Batch((row,)), lambda layer: seen.append((layer, [any(kv.layer(other)) for other in range(3)])))
    assert seen == [(0, [True, False, False]), (1, [True, True, False]), (2, [True, True, True])]


def test_draws_depend_on_seed_and_index_only() -> None:
    sampled = [expected_tokens([65], 20, SamplingParams(seed=seed)) for seed in (1, 2)]
    assert sampled[0] != sampled[1] != expected_tokens([65], 20)
    resumed = expected_tokens([65], 20, SamplingParams(seed=1))
    engine, _ = started(ScriptedModel(), num_blocks=3)
    sequence = Sequence.from_log(
        Request(request_id="r", prompt_token_ids=(65,), sampling=SamplingParams(seed=1)), tuple(resumed[:7])
    )
    sequence.block_table = [2, 0]
    assert generate(engine, sequence, 13) == resumed
    mistaken_for_a_prompt = expected_tokens([65, *resumed[:7]], 13, SamplingParams(seed=1))
    assert mistaken_for_a_prompt != resumed[7:]


def test_eos_comes_up_as_often_as_asked_and_not_before_min_tokens() -> None:
    rare = ScriptedModel(eos_every=8)
    lengths = [len(expected_tokens([first], 100, GREEDY, rare)) for first in range(200)]
    assert 5 < sum(lengths) / len(lengths) < 12
    assert EOS_TOKEN_ID in expected_tokens([1], 100, GREEDY, rare)
    patient = SamplingParams(temperature=0.0, min_tokens=20)
    assert all(EOS_TOKEN_ID not in expected_tokens([first], 100, patient, rare)[:20] for first in range(50))
    ignoring = SamplingParams(temperature=0.0, ignore_eos=True)
    assert len(expected_tokens([1], 100, ignoring, rare)) == 100
    assert all(32 <= token < 127 for token in expected_tokens([1], 100))


def test_stop_tokens_end_the_stream_once_allowed() -> None:
    stop = expected_tokens([65], 4)[3]
    until = expected_tokens([65], 50, SamplingParams(temperature=0.0, stop_token_ids=(stop,)))
    assert until.index(stop) == len(until) - 1
    later = SamplingParams(temperature=0.0, stop_token_ids=(stop,), min_tokens=10)
    assert stop not in expected_tokens([65], 50, later)[:10]


@pytest.mark.parametrize(("wanted", "num_top"), [(None, 0), (0, 0), (3, 3)])
def test_logprobs_as_asked(wanted: int | None, num_top: int) -> None:
    engine, _ = started(ScriptedModel(), num_blocks=1)
    token = compute(engine, sequence_of([65, 66], SamplingParams(temperature=0.0, logprobs=wanted), [0]), 2)
    assert token is not None
    assert (token.logprob is None) == (wanted is None)
    assert len(token.top_logprobs) == num_top
    if num_top:
        assert token.top_logprobs[0] == (token.token_id, token.logprob)
        values = [logprob for _, logprob in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert values[0] <= 0


def test_modelled_time_is_slept_layer_by_layer_if_at_all() -> None:
    naps: list[float] = []
    engine = ScriptedEngine(ScriptedModel(num_layers=4), StepCost(step=1.0, token=0.5, pair=0.1), naps.append)
    engine.allocate_kv(2, PrivateMemory)
    batch = Batch((ScheduledSequence(sequence_of([65] * 4, blocks=[0]), 0, 4, samples=True),))
    assert engine.step_seconds(batch) == pytest.approx(1.0 + 4 * 0.5 + 8 * 0.1)
    engine.step(batch, lambda layer: naps.append(-layer))
    assert naps[::2] == [pytest.approx(3.8 / 4)] * 4
    assert naps[1::2] == [0, -1, -2, -3]


def test_misuse_is_refused() -> None:
    engine = ScriptedEngine()
    with pytest.raises(ServingError, match="allocate_kv comes before"):
        compute(engine, sequence_of([65], blocks=[0]), 1)
    engine.allocate_kv(1, PrivateMemory)
    with pytest.raises(ServingError, match="request r has no block for position 16"):
        compute(engine, sequence_of([65] * 17, blocks=[0]), 17)


def test_memory_can_be_unmapped_after_close() -> None:
    memory = PrivateMemory(ScriptedModel().layout.block_bytes * 2)
    engine = ScriptedEngine()
    engine.allocate_kv(1, lambda _: memory)
    compute(engine, sequence_of([65] * 5, blocks=[0]), 5)
    content = memory.buffer.obj
    assert isinstance(content, bytearray)
    with pytest.raises(BufferError):
        content.clear()
    engine.close()
    content.clear()
