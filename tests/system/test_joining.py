"""Workers that join a server, without another host: over TLS on loopback."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from joined import END_SECONDS, join_point, joining, ready, refused
from server import SCRIPTED, START_SECONDS, Server, end, is_idle, launched, serving, soon

from diptych.engine.scripted import expected_tokens

PROMPT = list(b"heron 471 . maple 902 . ? heron " * 4)


@pytest.fixture
def key(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text("k" * 32)
    return str(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a worker of its own, and a key file that it has made."""
    key = str(tmp_path_factory.mktemp("joining") / "key")
    with serving(*SCRIPTED, "--mixed", "1", "--listen", "127.0.0.1:0", "--tls", "--key-file", key) as server:
        yield server


def flags(server: Server, name: str, role: str = "decode") -> tuple[str, ...]:
    key = server.process.args[server.process.args.index("--key-file") + 1]  # type: ignore[union-attr, index]
    return (*SCRIPTED, "--role", role, "--id", name, "--join", join_point(server), "--tls", "--key-file", str(key))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.mark.fault(34)
def test_a_server_of_joined_workers_only_comes_and_goes_and_they_stay(key: str, tmp_path: Path) -> None:
    """No worker of its own; it is killed, and its successor finds the same processes in new lives."""
    port = free_port()
    fleet = ("--listen", f"127.0.0.1:{port}", "--key-file", key, "--prefill", "0", "--decode", "0")
    joined = ("--join", f"127.0.0.1:{port}", "--key-file", key)
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(joining(tmp_path / f"{role}.log", *SCRIPTED, "--role", role, "--id", role, *joined))
            for role in ("prefill", "decode")
        ]
        with serving(*SCRIPTED, *fleet) as server:
            pids = {name: worker["pid"] for name, worker in server.fleet().items()}
            assert pids == {"prefill": workers[0].pid, "decode": workers[1].pid}
            with server.stream(PROMPT, "split", max_tokens=3000) as stream:
                next(stream.token_ids)
                server.process.kill()
        with serving(*SCRIPTED, *fleet) as server:
            assert {name: worker["pid"] for name, worker in server.fleet().items()} == pids
            assert min(worker["epoch"] for worker in server.fleet().values()) > 1
            soon(lambda: is_idle(server), "nothing is held for the server that was killed")
            answer = server.complete(PROMPT, "split", max_tokens=20)
            assert (answer.token_ids, answer.route) == (
                expected_tokens(PROMPT, 20),
                "prefill=prefill;decode=decode;transport=tcp",
            )
            end(server.process)
            assert [worker.wait(END_SECONDS) for worker in workers] == [0, 0]  # an orderly end is one for all


def test_patience_has_an_end(key: str, tmp_path: Path) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    line = refused(
        tmp_path / "log", *SCRIPTED, "--role", "mixed", "--join", nobody, "--key-file", key, "--rejoin-seconds", "0.1"
    )
    assert line.startswith(f"diptych: no router at tcp:{nobody}: ")


@pytest.mark.fault(46)
def test_the_newest_of_two_with_one_name_wins(server: Server, tmp_path: Path) -> None:
    with joining(tmp_path / "first", *flags(server, "twin")) as first:
        epoch = ready(server, "twin")
        with joining(tmp_path / "second", *flags(server, "twin")) as second:
            ready(server, "twin", above=epoch)
            assert first.wait(END_SECONDS) == 1
            assert "a newer life of worker twin" in (tmp_path / "first").read_text().splitlines()[-1]
            assert server.fleet()["twin"]["pid"] == second.pid


@pytest.mark.slow
@pytest.mark.fault(36)
def test_a_worker_that_was_frozen_comes_back_in_a_new_life(server: Server, tmp_path: Path) -> None:
    """Nobody can kill it from here: its old life is fenced off by its epoch. (Slow, since it stands still for five
    seconds; by default `test_frozen_worker` says the same of a worker that decodes.)"""
    with joining(tmp_path / "log", *flags(server, "far", "prefill")) as process:
        epoch = ready(server, "far")
        with server.stream(PROMPT, "split", max_tokens=200) as stream:
            token_ids = [next(stream.token_ids)]
            process.send_signal(signal.SIGSTOP)
            token_ids += stream.token_ids
        assert token_ids == expected_tokens(PROMPT, 200)
        soon(lambda: "far" not in server.fleet(), "its silence is noticed")
        process.send_signal(signal.SIGCONT)
        ready(server, "far", above=epoch)
        soon(lambda: "far" in server.complete(PROMPT, "split", max_tokens=4).route, "it is trusted again")
        assert server.complete(PROMPT, "split", max_tokens=20).token_ids == expected_tokens(PROMPT, 20)


@pytest.mark.fault(44)
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--id", "mixed-0"), ("mixed-0", "the server's own")),
        (("--max-model-len", "100"), ("contexts differ: 100 and 4096 tokens", "--max-model-len")),
        (("--tp", "3"), ("2 KV heads", "3 tensor ranks")),
        (("--id", "a b"), ("'a b'", "--id")),
        (("--advertise", "0.0.0.0"), ("0.0.0.0", "--advertise")),
        (("--join", "127.0.0.1"), ("127.0.0.1", "HOST:PORT")),
        (("--key-file", "/no/such/file"), ("--key-file", "/no/such/file")),
    ],
)
def test_who_cannot_join_says_why(
    server: Server, more: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    line = refused(tmp_path / "log", *flags(server, "misfit"), *more)
    assert line.startswith("diptych: ")
    assert all(word in line for word in words), line
    assert list(server.fleet()) == ["mixed-0"]


def test_without_tls_a_tls_server_is_not_joined(server: Server, tmp_path: Path) -> None:
    line = refused(tmp_path / "log", *(flag for flag in flags(server, "plain") if flag != "--tls"))
    assert "is --tls given on both sides?" in line


@pytest.mark.fault(37)
@pytest.mark.parametrize("hurry", [True, False], ids=["second signal", "end of grace"])
def test_a_worker_that_cannot_finish_in_time_ends_all_the_same(server: Server, hurry: bool, tmp_path: Path) -> None:
    grace = ("--grace-seconds", "60" if hurry else "0.2")
    with joining(tmp_path / "log", *flags(server, "slow", "mixed"), *grace) as process, contextlib.ExitStack() as stack:
        ready(server, "slow")
        prompts = ([64 + number] * 40 for number in range(32))
        streams = ((prompt, stack.enter_context(server.stream(prompt, "local", max_tokens=900))) for prompt in prompts)
        prompt, stream = next((prompt, stream) for prompt, stream in streams if stream.route == "local=slow")
        token_ids = [next(stream.token_ids)]
        process.terminate()
        if hurry:
            soon(lambda: server.fleet()["slow"]["state"] == "draining", "it says so")
            process.send_signal(signal.SIGINT)
        assert process.wait(END_SECONDS) == 0
        token_ids += stream.token_ids
        assert token_ids == expected_tokens(prompt, 900)  # the rest comes from the server's own worker


def complaint(*flags: str) -> str:
    with launched(*SCRIPTED, "--port", "0", *flags) as process:
        _, screen = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 1
    (line,) = [line for line in screen.splitlines() if line]
    return line


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--listen", "10.0.0.1:7000", "--key-file", "KEY"), ("10.0.0.1", "--tls")),
        (("--listen", "0.0.0.0:0", "--key-file", "KEY"), ("0.0.0.0", "--tls")),
        (("--listen", "0.0.0.0:0", "--key-file", "KEY", "--tls"), ("0.0.0.0", "--advertise")),
        (("--listen", "203.0.113.1:7000", "--key-file", "KEY", "--tls"), ("203.0.113.1", "--listen")),
        (("--listen", "127.0.0.1:0", "--key-file", "KEY", "--transport", "shm"), ("--transport shm", "--listen")),
        (("--listen", "7000", "--key-file", "KEY", "--tls"), ("7000", "HOST:PORT")),
    ],
)
def test_what_a_server_cannot_listen_to(more: tuple[str, ...], words: tuple[str, ...], key: str) -> None:
    line = complaint(*(key if flag == "KEY" else flag for flag in more))
    assert line.startswith("diptych: ")
    assert all(word in line for word in words), line


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("k" * 32)
    key.chmod(0o644)
    assert "chmod 600" in complaint("--listen", "127.0.0.1:0", "--key-file", str(key))
