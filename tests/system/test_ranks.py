"""Real processes whose prefill and decode workers are cut differently: pages are re-sharded on their way, and
every answer is right. (The scripted engine reads every byte of every rank back.)"""

from __future__ import annotations

import random
from itertools import product

import pytest
from cuts import cut_flags, ranks_of
from server import SCRIPTED, Server, is_idle, serving, soon

from diptych.engine.scripted import expected_tokens

Pair = tuple[str, str, str]  # prefill worker, decode worker, transport

SLICE: list[Pair] = [
    ("tp4", "tp1", "shm"),
    ("tp1 block32", "tp4", "tcp"),
    ("pp2", "tp2 block32", "tcp"),
    ("tp4 ep4", "dp4 ep4", "shm"),
]
ALL: list[Pair] = [
    *(
        (f"tp{ours}", f"tp{theirs}", transport)
        for ours, theirs in product((1, 2, 4), (1, 2, 4))
        for transport in ("shm", "tcp")
    ),
    *((f"tp{ours} block16", f"tp{theirs} block32", "shm") for ours, theirs in product((1, 2, 4), (1, 2, 4))),
    ("pp2", "tp2", "shm"),
    ("tp2", "pp2", "shm"),
    ("dp2 block32", "pp2", "tcp"),
    ("tp4 ep4", "dp4 ep4", "tcp"),
    ("dp4 ep4", "tp4 ep4", "shm"),
    ("tp2 pp2", "tp2 dp2 ep4", "tcp"),
]


def serve_pair(pair: Pair, *flags: str) -> tuple[str, ...]:
    prefill, decode, transport = pair
    return (*flags, "--transport", transport, *cut_flags(prefill, "prefill"), *cut_flags(decode, "decode"))


def check_answers(server: Server, prompts: list[list[int]], transport: str) -> None:
    right = [expected_tokens(prompt, 20) for prompt in prompts]
    for prefer, route in (
        ("split", f"prefill=prefill-0;decode=decode-0;transport={transport}"),
        ("local", "local=decode-0"),
    ):
        answers = server.complete_all(prompts, prefer, in_flight=8, max_tokens=20)
        assert [answer.token_ids for answer in answers] == right
        assert {answer.route for answer in answers} == {route}
    soon(lambda: is_idle(server), "all blocks are given back")


def check_pair(pair: Pair) -> None:
    prefill, decode, transport = pair
    chance = random.Random(str(pair))
    prompts = [[chance.randrange(32, 127) for _ in range(chance.randrange(1, 600))] for _ in range(10)]
    prompts += [prompts[0] + prompts[index][:300] for index in range(4)]  # with prefixes that are there already
    with serving(*serve_pair(pair, *SCRIPTED)) as server:
        fleet = server.fleet()
        assert (fleet["prefill-0"]["cut"], fleet["decode-0"]["cut"]) == (ranks_of(prefill), ranks_of(decode))
        check_answers(server, prompts, transport)
        assert server.metric("diptych_worker_handoffs_failed") == 0


@pytest.mark.parametrize("pair", SLICE, ids=" to ".join)
def test_answers_are_right(pair: Pair) -> None:
    check_pair(pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pair for pair in ALL if pair not in SLICE], ids=" to ".join)
def test_answers_are_right_for_every_pair(pair: Pair) -> None:
    check_pair(pair)
