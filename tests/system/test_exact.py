"""Split, local and `transformers`: the same tokens, for prompts of 1 to 2,000 tokens in float32.

Each case is a model family, a way for pages to travel, and a circumstance that must not show in the answer:
prefix-cache hits, chunked prefill, preemption; all of them with at least eight requests in flight.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from server import Completion, Server, is_idle, serving, soon

from checkpoints import make_checkpoint

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
EVICTED = Case(
    family="qwen3",
    transport="tcp",
    block_size=32,
    flags=("--eviction", "fifo", "--max-model-len", "2048", "--kv-cache-tokens", "6144", "--max-batch-tokens", "300"),
    in_flight=12,
)
# Short prompts: a token whose last choice of expert is a tie but for rounding goes either way, depending on
# the batch it is in, and every token more is another chance to meet one.
SPARSE = Case(family="qwen3moe", transport="shm", flags=("--max-batch-tokens", "128"), longest=400)


def prompts_of(case: Case) -> list[list[int]]:
    """Lengths from 1 to the longest, among them those around blocks; every other one shares a prefix with others."""
    chance = random.Random(case.family)
    size = case.block_size
    lengths = [1, 2, size - 1, size, size + 1, 2 * size, 5 * size + 1, case.longest]
    while len(lengths) < NUM_PROMPTS:
        lengths.append(int(case.longest ** chance.uniform(0.2, 1.0)))
    common = _tokens(chance, case.longest)
    shared = [chance.randrange(length) if index % 2 else 0 for index, length in enumerate(lengths)]
    return [common[:prefix] + _tokens(chance, length - prefix) for prefix, length in zip(shared, lengths, strict=True)]


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
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@dataclass(frozen=True)
class Answers:
    """What one route answered, and how often its workers preempted somebody meanwhile."""

    greedy: list[Completion]
    sampled: list[Completion]
    preemptions: float


def ask(case: Case, server: Server, prefer: str) -> Answers:
    """All prompts by one route, and some of them sampled."""
    prompts = prompts_of(case)
    options: dict[str, Any] = {"in_flight": case.in_flight, "max_tokens": case.max_tokens}
    before = server.metric("diptych_worker_preemptions")
    greedy = server.complete_all(prompts, prefer, **options)
    sampled = server.complete_all(prompts[::5], prefer, seed=11, **options, **SAMPLED)
    soon(lambda: is_idle(server), "all blocks are given back")
    return Answers(greedy, sampled, server.metric("diptych_worker_preemptions") - before)


@contextlib.contextmanager
def reference(case: Case, checkpoint: Path) -> Iterator[Future[list[list[int]]]]:
    """The right answers, computed while a server starts and is asked."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(by_transformers, checkpoint, prompts_of(case), case.max_tokens)


def check(case: Case, expected: list[list[int]], split: Answers, local: Answers) -> None:
    """Both routes were taken, and made no difference to each other or to `transformers`."""
    pair = f"prefill=prefill-0;decode=decode-0;transport={case.transport}"
    assert {answer.route for answer in split.greedy + split.sampled} == {pair}
    assert {answer.route for answer in local.greedy + local.sampled} == {"local=decode-0"}
    assert tokens(split.greedy) == expected
    assert tokens(local.greedy) == expected
    assert tokens(split.sampled) == tokens(local.sampled) != expected[::5]


def tokens(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def flags_of(case: Case, checkpoint: Path) -> tuple[str, ...]:
    common = ("--dtype", "float32", "--transport", case.transport, "--block-size", str(case.block_size))
    return (str(checkpoint), *common, *case.flags)


def test_with_prefix_cache_hits(directory: Path) -> None:
    checkpoint = make_checkpoint(PREFIX_HITS.family, directory)
    with (
        reference(PREFIX_HITS, checkpoint) as right,
        serving(*flags_of(PREFIX_HITS, checkpoint)) as server,
    ):
        split, local, again = (ask(PREFIX_HITS, server, prefer) for prefer in ("split", "local", "split"))
    check(PREFIX_HITS, right.result(), split, local)
    assert tokens(again.greedy) == tokens(split.greedy)
    size = PREFIX_HITS.block_size
    all_but_the_end = [(len(prompt) - 1) // size * size for prompt in prompts_of(PREFIX_HITS)]
    assert [answer.cached_tokens for answer in local.greedy] == all_but_the_end  # from pages that crossed
    assert [answer.cached_tokens for answer in again.greedy] == all_but_the_end


def test_with_chunked_prefill(directory: Path) -> None:
    checkpoint = make_checkpoint(CHUNKED.family, directory)
    with reference(CHUNKED, checkpoint) as right, serving(*flags_of(CHUNKED, checkpoint)) as server:
        split, local = (ask(CHUNKED, server, prefer) for prefer in ("split", "local"))
    check(CHUNKED, right.result(), split, local)
    assert not any(answer.cached_tokens for answer in split.greedy + local.greedy)


def test_with_preemption(directory: Path) -> None:
    checkpoint = make_checkpoint(PREEMPTED.family, directory)
    with reference(PREEMPTED, checkpoint) as right, serving(*flags_of(PREEMPTED, checkpoint)) as server:
        split, local = (ask(PREEMPTED, server, prefer) for prefer in ("split", "local"))
    check(PREEMPTED, right.result(), split, local)
    assert min(split.preemptions, local.preemptions) > 0


def test_with_eviction(directory: Path) -> None:
    checkpoint = make_checkpoint(EVICTED.family, directory)
    with reference(EVICTED, checkpoint) as right, serving(*flags_of(EVICTED, checkpoint)) as server:
        split, local = (ask(EVICTED, server, prefer) for prefer in ("split", "local"))
        cached_blocks = sum(worker["kv_blocks_cached"] for worker in server.fleet().values())
    check(EVICTED, right.result(), split, local)
    assert cached_blocks * EVICTED.block_size < sum(map(len, prompts_of(EVICTED)))
    assert any(answer.cached_tokens for answer in split.greedy)


def test_with_experts(directory: Path) -> None:
    checkpoint = make_checkpoint(SPARSE.family, directory)
    with reference(SPARSE, checkpoint) as right, serving(*flags_of(SPARSE, checkpoint)) as server:
        split, local = (ask(SPARSE, server, prefer) for prefer in ("split", "local"))
    check(SPARSE, right.result(), split, local)
