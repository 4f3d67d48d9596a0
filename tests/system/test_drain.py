"""Workers and servers that are asked to go: nothing is lost, and they go."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from server import SCRIPTED, Server, is_idle, serving, soon

from diptych.engine.scripted import expected_tokens

PROMPT = list(b"heron 471 . maple 902 . ? heron " * 4)


def epochs(server: Server) -> dict[str, int]:
    return {name: worker["epoch"] for name, worker in server.fleet().items() if worker["state"] == "ready"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(*SCRIPTED, "--prefill", "2", "--decode", "2") as server:
        yield server


@pytest.mark.fault(37, 38)
def test_every_worker_is_restarted_under_load_and_no_answer_changes(server: Server) -> None:
    restarted = threading.Event()

    def client(number: int) -> list[tuple[list[int], list[int]]]:
        answers = []
        while not restarted.is_set():
            prompt = [64 + number, 32 + len(answers) % 90, *PROMPT]
            answers.append((server.complete(prompt, "split", max_tokens=60).token_ids, expected_tokens(prompt, 60)))
        return answers

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        try:
            server.process.send_signal(signal.SIGHUP)
            names = ("prefill-0", "prefill-1", "decode-0", "decode-1")
            soon(lambda: epochs(server) == dict.fromkeys(names, 2), "all are in their second lives", within=60.0)
        finally:
            restarted.set()
        answers = [answer for client in clients for answer in client.result()]
    assert answers
    assert [right for given, right in answers if given != right] == []
    soon(lambda: is_idle(server), "all blocks are given back")
    assert not any("signal SIG" in line for line in server.screen)  # they have ended by themselves


@pytest.mark.fault(37)
def test_a_decode_worker_that_is_asked_to_go_hands_its_stream_over(server: Server) -> None:
    with server.stream(PROMPT, "split", max_tokens=800) as stream:
        token_ids = [next(stream.token_ids) for _ in range(5)]
        worker = server.fleet()[stream.route.split("decode=")[1].split(";")[0]]
        os.kill(worker["pid"], signal.SIGTERM)
        soon(lambda: server.fleet()[worker["id"]]["epoch"] > worker["epoch"], "it has left and come back")
        token_ids += stream.token_ids
    assert stream.done
    assert token_ids == expected_tokens(PROMPT, 800)
    soon(lambda: is_idle(server), "all blocks are given back")


@pytest.mark.fault(37)
def test_a_server_that_is_asked_to_go_finishes_its_streams() -> None:
    with serving(*SCRIPTED) as server:
        with server.stream(PROMPT, "split", max_tokens=400) as stream:
            token_ids = [next(stream.token_ids) for _ in range(5)]
            server.process.send_signal(signal.SIGTERM)
            soon(lambda: server.http.get("/ready").status_code == 503, "it is not ready")
            refused = server.http.post("/v1/completions", json=server.body(PROMPT, max_tokens=1))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) > 0
            token_ids += stream.token_ids
        assert stream.done
        assert token_ids == expected_tokens(PROMPT, 400)
        assert server.process.wait(30.0) == 0


@pytest.mark.fault(37)
def test_a_second_signal_ends_it_at_once() -> None:
    with serving(*SCRIPTED) as server, server.stream(PROMPT, "split", max_tokens=3900) as stream:
        next(stream.token_ids)
        server.process.send_signal(signal.SIGTERM)
        soon(lambda: server.http.get("/ready").status_code == 503, "it is not ready")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15.0) == 0
        assert not stream.done
