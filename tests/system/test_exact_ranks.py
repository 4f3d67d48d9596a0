"""Torch workers of several rank processes each: every answer is token for token that of `transformers`, which
knows nothing of ranks, whichever way prefill and decode workers are cut. In float32, on dense and sparse models."""

from __future__ import annotations

import random
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from cuts import ranks_of
from server import is_idle, serving, soon
from test_exact import by_transformers, tokens
from test_ranks import serve_pair

from checkpoints import make_checkpoint

MAX_TOKENS = 8
DENSE, SPARSE = "llama", "mixtral"

Case = tuple[str, str, str, str]  # family, prefill worker, decode worker, transport

SLICE: list[Case] = [
    (SPARSE, "tp4 ep4", "dp4 ep4", "shm"),  # the mission's layouts, in small
    (DENSE, "tp2", "tp4 block32", "tcp"),
    (DENSE, "pp2", "tp2", "shm"),
]
TENSOR = [(f"tp{ours}", f"tp{theirs}") for ours, theirs in product((1, 2, 4), (1, 2, 4))]
ALL: list[Case] = [
    *((DENSE, ours, theirs, "tcp") for ours, theirs in TENSOR),
    *((SPARSE, ours, theirs, "shm") for ours, theirs in TENSOR),
    *((DENSE, f"{ours} block32", f"{theirs} block16", "shm") for ours, theirs in TENSOR),
    (DENSE, "pp2", "tp1", "tcp"),
    (DENSE, "tp4", "pp2", "shm"),
    (DENSE, "tp4", "dp4", "tcp"),
    (SPARSE, "pp2", "dp2 ep2", "shm"),
    (SPARSE, "tp2 ep2", "dp2 ep2", "tcp"),
    (SPARSE, "dp2 ep2", "tp4 ep4", "shm"),
    (SPARSE, "tp2 pp2 block32", "tp2 dp2 ep4", "tcp"),
]


def prompts_of() -> list[list[int]]:
    """Around the ends of blocks, and some that begin like others."""
    chance = random.Random(3)
    longest = [chance.randrange(4, 509) for _ in range(300)]
    lengths = (1, 15, 16, 17, 33, 64, 150)
    own = [[chance.randrange(4, 509) for _ in range(length)] for length in lengths]
    return [*own, longest, longest[:130] + own[4], longest[:32] + own[5]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def right_answers(checkpoint: Path) -> list[list[int]]:
    return by_transformers(checkpoint, prompts_of(), MAX_TOKENS)


def check_case(case: Case, directory: Path) -> None:
    family, prefill, decode, transport = case
    checkpoint = make_checkpoint(family, directory)
    flags = (str(checkpoint), "--dtype", "float32", "--max-batch-tokens", "128", "--kv-cache-tokens", "32768")
    with serving(*serve_pair((prefill, decode, transport), *flags)) as server:
        fleet = server.fleet()
        assert (fleet["prefill-0"]["cut"], fleet["decode-0"]["cut"]) == (ranks_of(prefill), ranks_of(decode))
        for prefer, route in (
            ("split", f"prefill=prefill-0;decode=decode-0;transport={transport}"),
            ("local", "local=decode-0"),
        ):
            answers = server.complete_all(prompts_of(), prefer, in_flight=4, max_tokens=MAX_TOKENS)
            assert tokens(answers) == right_answers(checkpoint), prefer
            assert {answer.route for answer in answers} == {route}
        soon(lambda: is_idle(server), "all blocks are given back")
        assert server.metric("diptych_worker_handoffs_failed") == 0


@pytest.mark.parametrize("case", SLICE, ids=" ".join)
def test_answers_are_those_of_one_rank(case: Case, directory: Path) -> None:
    check_case(case, directory)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL if case not in SLICE], ids=" ".join)
def test_answers_are_those_of_one_rank_for_every_pair(case: Case, directory: Path) -> None:
    check_case(case, directory)
