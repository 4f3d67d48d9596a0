"""Greedy tokens in float32 are those of `transformers`, however the work is cut and wherever KV lies."""

from __future__ import annotations

import random

import pytest
import torch
from torch_harness import Harness, expected_tokens, random_prompt, reference

from checkpoints import FAMILIES
from diptych.core.request import SamplingParams
from diptych.core.sequence import Sequence

GREEDY_LOGPROBS = SamplingParams(temperature=0.0, logprobs=509)
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 421)
NUM_TOKENS = 8


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_many_lengths_in_one_batch(family: str) -> None:
    harness = Harness(family)
    prompts = [random_prompt(length) for length in LENGTHS]
    outputs = harness.generate([harness.sequence(prompt) for prompt in prompts], NUM_TOKENS)
    for prompt, output in zip(prompts, outputs, strict=True):
        wanted = expected_tokens(family, prompt, NUM_TOKENS)
        assert output[: len(wanted)] == wanted
    assert len({tuple(output) for output in outputs}) > len(LENGTHS) // 2


@pytest.mark.parametrize("family", ["llama3", "qwen3", "yarn"])
def test_logprobs_are_close_to_the_reference(family: str) -> None:
    """Tokens alone would forgive a small error in a scaling or an epsilon."""
    harness = Harness(family)
    prompt = random_prompt(300)
    (token,) = harness.step((harness.sequence(prompt, GREEDY_LOGPROBS), 300))
    assert token is not None
    with torch.inference_mode():
        wanted = reference(family)(torch.tensor([prompt])).logits[0, -1].log_softmax(dim=-1)
    found = dict(token.top_logprobs)
    torch.testing.assert_close(torch.tensor([found[index] for index in range(509)]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 16, 50])
def test_chunked_prefill(chunk: int) -> None:
    harness = Harness("llama3")
    prompt = random_prompt(150)
    assert harness.generate([harness.sequence(prompt)], NUM_TOKENS, chunk) == [
        expected_tokens("llama3", prompt, NUM_TOKENS)
    ]


def test_sequences_of_all_phases_share_steps() -> None:
    """Random shares of random subsets: chunks, first tokens and decodes mixed in every order."""
    harness = Harness("qwen3")
    generator = random.Random(3)
    prompts = [random_prompt(length, seed=5) for length in (1, 5, 16, 40, 97, 200)]
    sequences = [harness.sequence(prompt) for prompt in prompts]
    while running := [each for each in sequences if each.num_output_tokens < NUM_TOKENS]:
        chosen = generator.sample(running, generator.randint(1, len(running)))
        harness.step(*((sequence, generator.choice((1, 3, 16, 33, 100))) for sequence in chosen))
    for prompt, sequence in zip(prompts, sequences, strict=True):
        wanted = expected_tokens("qwen3", prompt, NUM_TOKENS)
        assert sequence.output_token_ids[: len(wanted)] == wanted


def test_kv_of_a_log_continues_in_another_engine() -> None:
    """Blocks copied byte by byte to other places of another engine's memory are all that a hand-off needs."""
    source, target = Harness("mistral"), Harness("mistral")
    prompt = random_prompt(77)
    sequence = source.sequence(prompt)
    source.step((sequence, 77))
    moved = Sequence.from_log(sequence.request, tuple(sequence.output_token_ids))
    moved.block_table = [200 + index for index in range(len(sequence.block_table))]
    size = source.engine.layout.block_bytes
    for layer in range(source.engine.layout.num_layers):
        here, there = source.memory.layer(layer), target.memory.layer(layer)
        for old, new in zip(sequence.block_table, moved.block_table, strict=True):
            there[new * size : (new + 1) * size] = here[old * size : (old + 1) * size]
    moved.num_computed_tokens = sequence.num_computed_tokens
    for _ in range(NUM_TOKENS - 1):
        target.step((moved, 1))
    assert moved.output_token_ids == expected_tokens("mistral", prompt, NUM_TOKENS)


@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_block_sizes(block_size: int) -> None:
    harness = Harness("llama", block_size=block_size)
    prompt = random_prompt(70)
    assert harness.generate([harness.sequence(prompt)], NUM_TOKENS) == [expected_tokens("llama", prompt, NUM_TOKENS)]


@pytest.mark.parametrize("dense_limit", [0, 512 << 20])
def test_decodes_of_very_different_contexts_fall_into_groups(monkeypatch: pytest.MonkeyPatch, dense_limit: int) -> None:
    monkeypatch.setattr("diptych.engine.torch_engine.plan.GROUP_BYTES", 1 << 16)
    harness = Harness("llama", dense_limit=dense_limit)
    prompts = [random_prompt(length) for length in (3, 400, 20, 21, 390, 1)]
    outputs = harness.generate([harness.sequence(prompt) for prompt in prompts], NUM_TOKENS)
    assert outputs == [expected_tokens("llama", prompt, NUM_TOKENS) for prompt in prompts]


def test_layers_are_reported_in_order_with_their_kv_in_place() -> None:
    harness = Harness("llama")
    sequence = harness.sequence(random_prompt(40))
    seen: list[tuple[int, bool]] = []

    def on_layer(index: int) -> None:
        layer = torch.frombuffer(harness.memory.layer(index), dtype=torch.float32)
        blocks = layer.view(-1, 2, 2, 16, 16)[sequence.block_table]  # [block, K or V, kv_head, slot, head_dim]
        by_token = blocks.permute(0, 3, 1, 2, 4).reshape(48, -1)
        seen.append((index, bool(by_token[:40].isfinite().all()) and not bool(by_token[40:].isfinite().any())))

    harness.step((sequence, 40), on_layer=on_layer)
    assert seen == [(0, True), (1, True), (2, True)]


def test_bfloat16_stays_close_to_float32() -> None:
    prompt = random_prompt(100)
    exact, rounded = Harness("llama", dtype="float32"), Harness("llama", dtype="bfloat16")
    assert rounded.memory.buffer.nbytes * 2 == exact.memory.buffer.nbytes
    logits = []
    for harness in (exact, rounded):
        sequence = harness.sequence(prompt, GREEDY_LOGPROBS)
        assert harness.step((sequence, 60)) == [None]
        (token,) = harness.step((sequence, 40))
        assert token is not None
        logits.append(dict(token.top_logprobs))
    assert max(abs(logits[0][token] - logits[1][token]) for token in logits[0]) < 0.5


def test_an_empty_batch_is_no_work() -> None:
    assert Harness("llama").step() == []
