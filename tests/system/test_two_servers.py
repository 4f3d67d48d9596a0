"""Two servers and a shaped link: four prefill ranks on one hand over to four decode ranks on the other."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuts import cut_flags, ranks_of
from joined import joining
from network import two_hosts
from server import SCRIPTED, Server, is_idle, serving, soon
from test_exact import by_transformers, tokens

from checkpoints import make_checkpoint
from diptych.engine.scripted import expected_tokens

PORT = 7000
ROUTE = "prefill=prefill-0;decode=far;transport=tcp"
MAX_TOKENS = 12


@dataclass(frozen=True)
class Cuts:
    near: str
    far: str


@contextlib.contextmanager
def two_servers(engine: tuple[str, ...], cuts: Cuts, directory: Path) -> Iterator[Server]:
    """The server has a prefill worker of its own; the decode worker joins from the other host."""
    key = directory / "key"
    key.touch(0o600)
    key.write_text("k" * 32)
    secret = ("--tls", "--key-file", str(key))
    with contextlib.ExitStack() as stack:
        near, far = stack.enter_context(two_hosts())
        stack.enter_context(near.entered())
        here = f"{near.address}:{PORT}"
        with far.entered():
            worker = (*engine, *cut_flags(cuts.far), "--role", "decode", "--id", "far", "--join", here, *secret)
            stack.enter_context(joining(directory / "worker.log", *worker))
        server = (*engine, *cut_flags(cuts.near, "prefill"), "--decode", "0", "--listen", here, *secret)
        yield stack.enter_context(serving(*server))


def check(server: Server, cuts: Cuts, prompts: list[list[int]], right: list[list[int]]) -> None:
    shown = {name: worker["cut"] for name, worker in server.fleet().items()}
    assert shown == {"prefill-0": ranks_of(cuts.near), "far": ranks_of(cuts.far)}
    answers = server.complete_all(prompts, "split", in_flight=8, max_tokens=MAX_TOKENS)
    assert {answer.route for answer in answers} == {ROUTE}
    assert tokens(answers) == right
    soon(lambda: is_idle(server), "all blocks are given back")


@pytest.mark.parametrize(
    "cuts",
    [Cuts("tp4 ep4", "dp4 ep4 block32"), pytest.param(Cuts("tp4", "tp4"), marks=pytest.mark.slow)],
    ids=["tp4 to dp4", "tp4 to tp4"],
)
def test_four_ranks_hand_over_to_four_ranks(cuts: Cuts, tmp_path: Path) -> None:
    chance = random.Random(5)
    prompts = [[chance.randrange(32, 127) for _ in range(chance.randrange(1, 1500))] for _ in range(16)]
    with two_servers(SCRIPTED, cuts, tmp_path) as server:
        check(server, cuts, prompts, [expected_tokens(prompt, MAX_TOKENS) for prompt in prompts])


@pytest.mark.slow
def test_four_rank_processes_hand_over_to_four_rank_processes(tmp_path: Path) -> None:
    """Tensor and expert parallel there, data-parallel attention and expert parallel here."""
    checkpoint = make_checkpoint("mixtral", tmp_path)
    cuts = Cuts("tp4 ep4", "dp4 ep4")
    chance = random.Random(7)
    prompts = [[chance.randrange(4, 509) for _ in range(chance.randrange(1, 300))] for _ in range(8)]
    right = by_transformers(checkpoint, prompts, MAX_TOKENS)
    engine = (str(checkpoint), "--dtype", "float32", "--kv-cache-tokens", "32768")
    with two_servers(engine, cuts, tmp_path) as server:
        check(server, cuts, prompts, right)
