"""Processes that are killed, ended, started side by side, or told something that they cannot do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server import SCRIPTED, START_SECONDS, STOP_SECONDS, Server, end, is_idle, launched, serving, soon

from diptych.bench import processes
from diptych.engine.scripted import expected_tokens

PROMPT = list(b"heron 471 . maple 902 . ? heron " * 4)
LONG_PROMPT = PROMPT * 24  # takes the scripted engine about a second to read


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(*SCRIPTED) as server:
        yield server


def kill(server: Server, worker_id: str) -> int:
    """SIGKILL a worker; returns the epoch that has ended."""
    worker = server.fleet()[worker_id]
    os.kill(worker["pid"], signal.SIGKILL)
    return int(worker["epoch"])


def check_recovery(server: Server, worker_id: str, old_epoch: int) -> None:
    """It comes back in a new life, nothing is left of the requests of the old one, and both routes work."""

    def is_back() -> bool:
        worker = server.fleet()[worker_id]
        return (worker["state"], worker["epoch"]) == ("ready", old_epoch + 1)

    soon(is_back, f"{worker_id} comes back")
    assert any(f"worker {worker_id} ended (signal SIGKILL)" in line for line in server.screen)
    soon(lambda: is_idle(server), "all blocks are given back")
    soon(lambda: server.http.get("/ready").status_code == 200, "it is trusted again")
    for prefer in ("split", "local"):
        assert server.complete(PROMPT, prefer, max_tokens=20).token_ids == expected_tokens(PROMPT, 20)


@pytest.mark.fault(32)
def test_death_of_the_decode_worker_costs_its_streams_a_pause(server: Server) -> None:
    with server.stream(PROMPT, "split", max_tokens=400) as stream:
        token_ids = [next(stream.token_ids) for _ in range(5)]
        epoch = kill(server, "decode-0")
        token_ids += stream.token_ids
    assert stream.done
    assert token_ids == expected_tokens(PROMPT, 400)
    check_recovery(server, "decode-0", epoch)


@pytest.mark.fault(30)
def test_death_of_the_prefill_worker_costs_what_it_prefills_a_pause(server: Server) -> None:
    with ThreadPoolExecutor(1) as pool, server.stream(PROMPT, "split", max_tokens=400) as handed_over:
        token_ids = [next(handed_over.token_ids) for _ in range(2)]
        prefilling = pool.submit(server.complete, LONG_PROMPT, "split", max_tokens=20)
        soon(lambda: server.fleet()["prefill-0"]["running"], "it prefills")
        epoch = kill(server, "prefill-0")
        assert prefilling.result().token_ids == expected_tokens(LONG_PROMPT, 20)
        token_ids += handed_over.token_ids
    assert handed_over.done
    assert token_ids == expected_tokens(PROMPT, 400)
    check_recovery(server, "prefill-0", epoch)


@pytest.mark.fault(36)
def test_a_worker_that_hangs_is_replaced(server: Server) -> None:
    worker = server.fleet()["decode-0"]
    with server.stream(PROMPT, "split", max_tokens=400) as stream:
        token_ids = [next(stream.token_ids)]
        os.kill(worker["pid"], signal.SIGSTOP)
        token_ids += stream.token_ids
    assert token_ids == expected_tokens(PROMPT, 400)
    check_recovery(server, "decode-0", worker["epoch"])


@pytest.mark.fault(33)
def test_with_every_worker_dead_streams_wait_and_newcomers_are_told_to() -> None:
    with serving(*SCRIPTED) as server:
        with server.stream(PROMPT, "split", max_tokens=400) as stream:
            token_ids = [next(stream.token_ids) for _ in range(5)]
            epochs = {name: kill(server, name) for name in ("prefill-0", "decode-0")}
            soon(lambda: all(worker["state"] != "ready" for worker in server.fleet().values()), "it is noticed")
            refused = server.http.post("/v1/completions", json=server.body(PROMPT, max_tokens=1))
            if refused.status_code != 200:  # else they have come back already
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker")
                assert int(refused.headers["retry-after"]) > 0
            token_ids += stream.token_ids
        assert stream.done
        assert token_ids == expected_tokens(PROMPT, 400)
        for name, epoch in epochs.items():
            check_recovery(server, name, epoch)


@pytest.mark.fault(29)
def test_local_requests_are_served_while_there_is_no_prefill_worker(server: Server) -> None:
    epoch = kill(server, "prefill-0")
    soon(lambda: server.fleet()["prefill-0"]["state"] != "ready", "its death is noticed")
    answer = server.complete(PROMPT, max_tokens=20)
    assert (answer.token_ids, answer.route) == (expected_tokens(PROMPT, 20), "local=decode-0")
    check_recovery(server, "prefill-0", epoch)


def test_two_servers_side_by_side(server: Server) -> None:
    with serving(*SCRIPTED, "--mixed", "1", "--served-model-name", "other") as other:
        assert other.url != server.url
        with server.stream(PROMPT, "split", max_tokens=100) as stream:
            answer = other.complete(PROMPT, max_tokens=20)
            assert list(stream.token_ids) == expected_tokens(PROMPT, 100)
        assert (answer.token_ids, answer.route) == (expected_tokens(PROMPT, 20), "local=mixed-0")
    assert server.complete(PROMPT, "split", max_tokens=20).token_ids == expected_tokens(PROMPT, 20)


@pytest.mark.fault(34)
def test_workers_do_not_outlive_the_server() -> None:
    with serving(*SCRIPTED, "--prefill", "2") as server, server.stream(PROMPT, "split", max_tokens=2000) as stream:
        next(stream.token_ids)
        family = server.processes()
        assert len(family) == 4
        server.process.kill()
        try:
            soon(lambda: not processes.still_alive(family), "every worker ends")
        finally:
            for pid in processes.still_alive(family):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.fault(37)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process(signum: signal.Signals) -> None:
    with serving(*SCRIPTED) as server:
        assert len(server.processes()) == 3
        assert server.complete(PROMPT, "split", max_tokens=4).token_ids == expected_tokens(PROMPT, 4)
        assert end(server.process, signum) == 0


def test_ctrl_c_ends_a_stream_with_an_error() -> None:
    with serving(*SCRIPTED) as server, server.stream(PROMPT, "split", max_tokens=3900) as stream:
        next(stream.token_ids)
        server.process.send_signal(signal.SIGINT)
        for _ in stream.token_ids:
            pass
        assert stream.error is not None
        assert stream.error["code"] == "draining"
        assert server.process.wait(STOP_SECONDS) == 0


def complaint(*flags: str) -> tuple[int, str]:
    """Exit status and the one line that is printed of a server that cannot start."""
    with launched(*flags) as process:
        _, screen = process.communicate(timeout=START_SECONDS)
    lines = [line for line in screen.splitlines() if line]
    assert len(lines) == 1, lines
    return process.returncode, lines[0]


def test_port_in_use(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    assert complaint(*SCRIPTED, "--port", port) == (
        1,
        f"diptych: port {port} on 127.0.0.1 is in use; choose another with --port",
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("./no/such/model",), ("./no/such/model",)),
        ((*SCRIPTED, "--kv-cache-tokens", "64"), ("64 tokens", "--kv-cache-tokens", "--max-model-len")),
        ((*SCRIPTED, "--api-key", ""), ("--api-key",)),
        ((*SCRIPTED, "--host", "host.invalid"), ("--host", "host.invalid")),
        ((*SCRIPTED, "--journal", "/dev/null/x"), ("--journal /dev/null/x: Not a directory",)),
    ],
    ids=lambda value: "-".join(value[-2:]).replace("/", "_") if isinstance(value, tuple) else None,
)
def test_what_cannot_be_served_is_said_in_one_line(flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    status, line = complaint(*flags, "--port", "0")
    assert status == 1
    assert line.startswith("diptych: ")
    assert all(word in line for word in words), line


def test_a_flag_that_is_not_taken() -> None:
    with launched("--transport", "pigeon") as process:
        _, screen = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 2
    assert "--transport" in screen
    assert "Traceback" not in screen


def test_config_file(tmp_path: Path) -> None:
    config = tmp_path / "diptych.toml"
    config.write_text('engine = "scripted"\nserved-model-name = ["a", "b"]\nmixed = 1\nmax_model_len = 100\nport = 1\n')
    with serving("--config", str(config), "--max-model-len", "200") as server:  # as does --port, the flag wins
        assert list(server.fleet()) == ["mixed-0"]
        models = server.http.get("/v1/models").json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("a", 200), ("b", 200)]
