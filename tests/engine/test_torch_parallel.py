"""Several ranks compute what one rank does, however the model is cut."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch_harness import EngineHarness, Harness, checkpoint, expected_tokens, random_prompt
from torch_parallel_harness import ParallelHarness, Ranks, kv_of, started

from diptych.core.errors import EngineCorrupt
from diptych.core.request import SamplingParams
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.core.settings import ParallelSettings
from diptych.engine.torch_engine.runner import TorchEngine

NUM_TOKENS = 6
LENGTHS = (1, 5, 16, 33, 130, 64, 97)
FUSED = {"fused_experts": True}
# Sampling that remembers the log, draws, and says how likely each token was.
VARIED = SamplingParams(temperature=0.8, top_p=0.9, seed=11, frequency_penalty=0.5, repetition_penalty=1.2, logprobs=3)


def cut(family: str, overrides: dict[str, Any] | None = None, slow: bool = False, **parallel: int) -> Any:
    name = "-".join([family, *(overrides or {}), *(f"{kind}{count}" for kind, count in parallel.items())])
    settings = ParallelSettings(**parallel)
    return pytest.param((family, overrides or {}, settings), marks=[pytest.mark.slow] if slow else [], id=name)


CUTS = [
    cut("llama", tensor=2),
    cut("yarn", tensor=2, pipeline=2),  # biases everywhere
    cut("qwen3moe", data=2, expert=2),
    cut("mixtral", tensor=2, data=2, expert=4),
    cut("llama", tensor=4, slow=True),  # more ranks than KV heads
    cut("mistral", tensor=2, slow=True),  # one KV head for both
    cut("qwen2", tensor=4, slow=True),  # tied embeddings
    cut("qwen3", tensor=2, slow=True),
    cut("llama3", pipeline=2, slow=True),
    cut("qwen2", pipeline=3, slow=True),  # tied embeddings, in two places
    cut("llama", data=2, slow=True),
    cut("llama", tensor=2, data=2, slow=True),
    cut("mixtral", tensor=2, slow=True),
    cut("mixtral", tensor=2, expert=2, slow=True),
    cut("mixtral", FUSED, tensor=2, slow=True),
    cut("mixtral", FUSED, tensor=2, expert=2, slow=True),
    cut("mixtral", tensor=4, expert=4, slow=True),
    cut("mixtral", data=4, expert=4, slow=True),
    cut("qwen3moe", tensor=2, slow=True),
    cut("qwen3moe", tensor=4, expert=4, slow=True),
    cut("qwen3moe", FUSED, tensor=4, slow=True),
    cut("qwen3moe", FUSED, data=4, expert=4, slow=True),
    cut("qwen3moe", tensor=2, data=2, slow=True),
    cut("qwen3moe", tensor=2, data=2, expert=4, slow=True),
    cut("qwen3moe", tensor=2, pipeline=2, expert=2, slow=True),
    cut("qwen3moe", pipeline=2, data=2, expert=2, slow=True),
]


@pytest.fixture(scope="module", params=CUTS)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    family, overrides, parallel = request.param
    with started(checkpoint(family, **overrides), parallel) as ranks:
        yield ranks


def run_mixed(harness: EngineHarness, sequences: list[Sequence], num_tokens: int) -> None:
    """Random shares of random subsets: chunks, first tokens and decodes in every order, and ranks without rows."""
    generator = random.Random(3)
    while running := [each for each in sequences if each.num_output_tokens < num_tokens]:
        chosen = generator.sample(running, generator.randint(1, len(running)))
        harness.step(*((sequence, generator.choice((1, 3, 16, 33, 100))) for sequence in chosen))


def test_tokens_are_those_of_the_reference(ranks: Ranks) -> None:
    harness = ParallelHarness(ranks)
    prompts = [random_prompt(length, seed=5) for length in LENGTHS]
    sequences = [harness.sequence(prompt) for prompt in prompts]
    run_mixed(harness, sequences, NUM_TOKENS)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        wanted = expected_tokens(ranks.model, prompt, NUM_TOKENS)
        assert sequence.output_token_ids[: len(wanted)] == wanted
    assert len({tuple(each.output_token_ids) for each in sequences}) > len(LENGTHS) // 2


def test_each_rank_holds_its_share_of_the_kv(ranks: Ranks) -> None:
    """What one rank alone computes, cut as the layout says."""
    here, alone = ParallelHarness(ranks), Harness(ranks.model)
    prompts = [random_prompt(length, seed=6) for length in (3, 20, 64, 70)]
    sequences = [here.sequence(prompt) for prompt in prompts]
    wanted = [alone.sequence(prompt) for prompt in prompts]
    for harness, some in ((here, sequences), (alone, wanted)):
        harness.step(*((sequence, 50) for sequence in some))
        harness.step(*((sequence, 50) for sequence in some))
    layout = ranks.engine.layout
    for memory in ranks.memories:
        data_rank = memory.rank // (layout.pipeline_parallel * layout.tensor_parallel)
        heads = layout.heads_of(memory.rank)
        for sequence, other in zip(sequences, wanted, strict=True):
            if sequence.data_rank != data_rank:
                continue
            used = slice(sequence.num_computed_tokens)
            for layer in layout.layers_of(memory.rank):
                expected = kv_of(alone.memory, layer, other)[:, heads.start : heads.stop, used]
                torch.testing.assert_close(kv_of(memory, layer, sequence)[:, :, used], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_sequences", [1, 4])
def test_layers_are_reported_in_order_with_their_kv_in_place(ranks: Ranks, num_sequences: int) -> None:
    """With one sequence, other data-parallel ranks have nothing to write."""
    harness = ParallelHarness(ranks)
    layout = ranks.engine.layout
    sequences = [harness.sequence(random_prompt(40, seed=seed)) for seed in range(num_sequences)]
    seen: list[tuple[int, bool]] = []

    def written(memory: Any, layer: int, sequence: Sequence) -> bool:
        blocks = Sequence.from_log(sequence.request)
        blocks.block_table, blocks.num_computed_tokens = sequence.block_table, 40
        kv = kv_of(memory, layer, blocks)
        return bool(kv[:, :, :40].isfinite().all()) and not bool(kv[:, :, 40:].isfinite().any())

    def on_layer(layer: int) -> None:
        holders = [memory for memory in ranks.memories if layer in layout.layers_of(memory.rank)]
        size = layout.pipeline_parallel * layout.tensor_parallel
        pairs = [(m, s) for m in holders for s in sequences if m.rank // size == s.data_rank]
        assert pairs
        seen.append((layer, all(written(memory, layer, sequence) for memory, sequence in pairs)))

    harness.step(*((sequence, 40) for sequence in sequences), on_layer=on_layer)
    assert seen == [(0, True), (1, True), (2, True)]


def test_sampling_is_that_of_one_rank(ranks: Ranks) -> None:
    here, alone = ParallelHarness(ranks), Harness(ranks.model)
    prompts = [random_prompt(length, seed=8) for length in (4, 30, 51)]
    sequences = [here.sequence(prompt, VARIED) for prompt in prompts]
    wanted = [alone.sequence(prompt, VARIED) for prompt in prompts]
    for _ in range(NUM_TOKENS):
        found = here.step(*((sequence, 100) for sequence in sequences))
        for token, other in zip(found, alone.step(*((sequence, 100) for sequence in wanted)), strict=True):
            assert token is not None
            assert other is not None
            assert token.token_id == other.token_id
            assert token.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert dict(token.top_logprobs) == pytest.approx(dict(other.top_logprobs), abs=1e-3)


def test_corrupt_kv_fails_its_request_alone_and_the_step_can_be_repeated(ranks: Ranks) -> None:
    harness = ParallelHarness(ranks)
    prompts = [random_prompt(20), random_prompt(30), random_prompt(10)]
    sequences = [harness.sequence(prompt) for prompt in prompts]
    harness.step(*((sequence, 30) for sequence in sequences))
    corrupt = sequences[0]
    size = ranks.engine.layout.block_bytes
    first = corrupt.block_table[0]
    ranks.memories[0].layer(0)[first * size : (first + 1) * size] = b"\xff" * size
    rows = tuple(ScheduledSequence(each, each.num_computed_tokens, 1, True) for each in sequences)
    with pytest.raises(EngineCorrupt) as caught:
        ranks.engine.step(Batch(rows))
    assert caught.value.request_ids == (corrupt.request_id,)
    results = ranks.engine.step(Batch(rows[1:]))
    for prompt, sequence, token in zip(prompts[1:], sequences[1:], results, strict=True):
        assert token is not None
        assert [*sequence.output_token_ids, token.token_id] == expected_tokens(ranks.model, prompt, 2)


def test_a_preempted_sequence_and_another_one_of_its_name(ranks: Ranks) -> None:
    harness = ParallelHarness(ranks)
    prompts = [random_prompt(40), random_prompt(41)]
    for prompt in prompts:
        sequence = harness.sequence(prompt, request_id="again")
        neighbour = harness.sequence(random_prompt(9))
        harness.step((sequence, 100), (neighbour, 100))
        harness.step((sequence, 100))
        harness.preempt(sequence)
        harness.step((neighbour, 1))
        while sequence.num_output_tokens < NUM_TOKENS:
            harness.step((sequence, 30), (neighbour, 1))
        assert sequence.output_token_ids == expected_tokens(ranks.model, prompt, NUM_TOKENS)
        if prompt is prompts[0]:
            harness.give_back(neighbour)
    ranks.engine.forget("again")
    ranks.engine.forget("never heard of")


def test_an_empty_batch_is_no_work(ranks: Ranks) -> None:
    assert ranks.engine.step(Batch(())) == []


def test_all_cuts_serve_the_same_model(ranks: Ranks) -> None:
    alone = TorchEngine.load(ranks.model)
    assert ranks.engine.model == alone.model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "parallel"),
    [
        ("llama", ParallelSettings(tensor=2)),
        ("yarn", ParallelSettings(pipeline=2)),
        ("qwen3moe", ParallelSettings(data=2, expert=2)),
    ],
)
def test_bfloat16_stays_close_to_one_rank(family: str, parallel: ParallelSettings) -> None:
    """On average: rounding sends some tokens to another expert of nearly the same weight."""
    everything = SamplingParams(temperature=0.0, logprobs=509)
    prompt = random_prompt(100)
    logprobs = []
    with started(family, parallel, dtype="bfloat16") as ranks:
        for harness in (ParallelHarness(ranks), Harness(family, dtype="bfloat16")):
            sequence = harness.sequence(prompt, everything)
            assert harness.step((sequence, 60)) == [None]
            (token,) = harness.step((sequence, 40))
            assert token is not None
            found = dict(token.top_logprobs)
            logprobs.append(torch.tensor([found[index] for index in range(509)]))
    assert (logprobs[0] - logprobs[1]).abs().mean() < 0.2 < logprobs[0].std()
