"""A rank process dies: its worker ends with it, streams go on elsewhere, and a new life takes its place."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from server import Server, is_idle, serving, soon
from test_exact import by_transformers

from checkpoints import make_checkpoint
from diptych.bench import processes

PROMPT = [4 + 37 * index % 505 for index in range(50)]
MAX_TOKENS = 120


def rank_processes(server: Server, worker_id: str) -> list[int]:
    pid = server.fleet()[worker_id]["pid"]
    return [child for child in processes.tree(pid) if child != pid]


@pytest.mark.fault(32)
def test_death_of_a_rank_costs_its_streams_a_pause(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", tmp_path)
    [right] = by_transformers(checkpoint, [PROMPT], MAX_TOKENS)
    with serving(str(checkpoint), "--dtype", "float32", "--decode-tp", "2", "--kv-cache-tokens", "8192") as server:
        epoch, ranks = server.fleet()["decode-0"]["epoch"], rank_processes(server, "decode-0")
        assert len(ranks) == 2
        with server.stream(PROMPT, "split", max_tokens=MAX_TOKENS) as stream:
            token_ids = [next(stream.token_ids) for _ in range(5)]
            os.kill(ranks[1], signal.SIGKILL)
            token_ids += stream.token_ids
        assert (token_ids, stream.done) == (right, True)

        def is_back(life: int) -> bool:
            worker = server.fleet()["decode-0"]
            return (worker["state"], worker["epoch"]) == ("ready", life)

        soon(lambda: is_back(epoch + 1), "it comes back", within=60)
        soon(lambda: is_idle(server), "all blocks are given back")
        assert not set(ranks) & set(rank_processes(server, "decode-0"))
        soon(lambda: server.http.get("/ready").status_code == 200, "it is trusted again")
        answer = server.complete(PROMPT, "split", max_tokens=MAX_TOKENS)
        assert (answer.token_ids, answer.route) == (right, "prefill=prefill-0;decode=decode-0;transport=shm")
        os.kill(rank_processes(server, "decode-0")[0], signal.SIGKILL)
        soon(lambda: is_back(epoch + 2), "a worker that had nothing to do comes back, too", within=60)
