"""Split, local and `transformers`: the same tokens, for prompts of 1 to 2,000 tokens in float32.

Each case is a model family, a way for pages to travel, and a circumstance that must not show in the answer:
prefix-cache hits, chunked prefill, preemption; all of them with at least eight requests in flight.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from server import Completion, Server, is_idle, serving, soon

NUM_PROMPTS = 50  # of each case
IN_FLIGHT = 8
SAMPLED = {
    "temperature": 1.0,
    "top_p": 0.95,
    "top_k": 200,
    "min_p": 0.001,
    "frequency_penalty": 0.4,
    "presence_penalty": 0.2,
    "repetition_penalty": 1.1,
    "logit_bias": {"7": 1.5},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    transport: str
    block_size: int = 16
    flags: tuple[str, ...] = ()
    longest: int = 2000  # prompt, in tokens
    max_tokens: int = 12
    in_flight: int = IN_FLIGHT


PREFIX_HITS = Case(family="llama3", transport="shm")
CHUNKED = Case(
    family="mistral",
    transport="tcp",
    block_size=32,
    flags=("--max-batch-tokens", "96", "--max-sequences", "16", "--no-prefix-caching"),
)
PREEMPTED = Case(
    family="qwen2",
    transport="shm",
    flags=("--max-model-len", "512", "--kv-cache-tokens", "512"),
    longest=400,
    max_tokens=48,
    in_flight=16,
)
FIFO = Case(
    family="qwen3",
    transport="tcp",
    block_size=32,
    flags=("--eviction", "fifo", "--max-model-len", "2048", "--kv-cache-tokens", "6144", "--max-batch-tokens", "300"),
    in_flight=12,
)


def prompts_of(case: Case) -> list[list[int]]:
    """Lengths from 1 to the longest, among them those around blocks; every other one shares a prefix with others."""
    chance = random.Random(case.family)
    size = case.block_size
    lengths = [1, 2, size - 1, size, size + 1, 2 * size, 5 * size + 1, case.longest]
    while len(lengths) < NUM_PROMPTS:
        lengths.append(int(case.longest ** chance.uniform(0.2, 1.0)))
    common = _tokens(chance, case.longest)
    shared = [chance.randrange(length) if index % 2 else 0 for index, length in enumerate(lengths)]
    return [
        common[:prefix] + _tokens(chance, length - prefix) for prefix, length in zip(shared, lengths, strict=True)
    ]


def _tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(4, 509) for _ in range(count)]


def by_transformers(checkpoint: Path, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """What greedy `generate` answers, one prompt at a time."""
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
            )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def tokens(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def serve_and_compare(case: Case, server: Server, checkpoint: Path) -> dict[str, list[Completion]]:
    """All prompts split and local, against `transformers`; some of them sampled, split against local."""
    prompts = prompts_of(case)
    answers: dict[str, list[Completion]] = {}
    for prefer, route in (
        ("split", f"prefill=prefill-0;decode=decode-0;transport={case.transport}"),
        ("local", "local=decode-0"),
    ):
        options: dict[str, Any] = {"in_flight": case.in_flight, "max_tokens": case.max_tokens}
        answers[prefer] = server.complete_all(prompts, prefer, **options)
        answers[f"sampled {prefer}"] = server.complete_all(prompts[::5], prefer, seed=11, **options, **SAMPLED)
        assert {answer.route for answer in answers[prefer] + answers[f"sampled {prefer}"]} == {route}
    expected = by_transformers(checkpoint, prompts, case.max_tokens)
    assert tokens(answers["split"]) == expected
    assert tokens(answers["local"]) == expected
    assert tokens(answers["sampled split"]) == tokens(answers["sampled local"]) != expected[::5]
    soon(lambda: is_idle(server), "all blocks are given back")
    return answers


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def flags_of(case: Case, checkpoint: Path) -> tuple[str, ...]:
    common = ("--dtype", "float32", "--transport", case.transport, "--block-size", str(case.block_size))
    return (str(checkpoint), *common, *case.flags)


def test_with_prefix_cache_hits(directory: Path) -> None:
    checkpoint = make_checkpoint(PREFIX_HITS.family, directory)
    with serving(*flags_of(PREFIX_HITS, checkpoint)) as server:
        first = serve_and_compare(PREFIX_HITS, server, checkpoint)
        prompts = prompts_of(PREFIX_HITS)
        again = server.complete_all(prompts, "split", in_flight=IN_FLIGHT, max_tokens=PREFIX_HITS.max_tokens)
    assert tokens(again) == tokens(first["split"])
    size = PREFIX_HITS.block_size
    assert [answer.cached_tokens for answer in again] == [(len(prompt) - 1) // size * size for prompt in prompts]


def test_with_chunked_prefill(directory: Path) -> None:
    checkpoint = make_checkpoint(CHUNKED.family, directory)
    with serving(*flags_of(CHUNKED, checkpoint)) as server:
        answers = serve_and_compare(CHUNKED, server, checkpoint)
    assert not any(answer.cached_tokens for answer in answers["split"] + answers["local"])


def test_with_preemption(directory: Path) -> None:
    checkpoint = make_checkpoint(PREEMPTED.family, directory)
    with serving(*flags_of(PREEMPTED, checkpoint)) as server:
        serve_and_compare(PREEMPTED, server, checkpoint)
        assert server.metric("diptych_worker_preemptions") > 0


def test_with_eviction(directory: Path) -> None:
    checkpoint = make_checkpoint(FIFO.family, directory)
    with serving(*flags_of(FIFO, checkpoint)) as server:
        answers = serve_and_compare(FIFO, server, checkpoint)
        cached = sum(worker["kv_blocks_cached"] for worker in server.fleet().values())
        assert cached * FIFO.block_size < sum(map(len, prompts_of(FIFO)))
    assert any(answer.cached_tokens for answer in answers["split"])
