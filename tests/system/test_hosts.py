"""Across hosts: router and prefill worker on one, a decode worker on another, TLS over a shaped link between."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from joined import joining, leave, ready, refused
from network import Host, two_hosts
from server import SCRIPTED, Server, is_idle, serving, soon

from diptych.engine.scripted import expected_tokens
from diptych.wire import handshake

PORT = 7000
PROMPT = list(b"heron 471 . maple 902 . ? heron " * 4)
ROUTE = "prefill=prefill-0;decode=far;transport=tcp"


@dataclass(frozen=True)
class Hosts:
    """The test is on `near`, and starts workers on `far`."""

    near: Host
    far: Host
    directory: Path

    @property
    def key(self) -> Path:
        return self.directory / "key"

    @property
    def log(self) -> Path:
        return self.directory / "worker.log"

    @property
    def flags(self) -> tuple[str, ...]:
        return (*SCRIPTED, "--role", "decode", "--id", "far", "--join", f"{self.near.address}:{PORT}")

    @contextlib.contextmanager
    def worker(self) -> Iterator[subprocess.Popen[str]]:
        """The worker on `far`, while the context lasts."""
        with contextlib.ExitStack() as stack:
            with self.far.entered():
                flags = (*self.flags, "--key-file", str(self.key), "--tls")
                process = stack.enter_context(joining(self.log, *flags))
            yield process


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts() as (near, far), near.entered():
        hosts = Hosts(near, far, tmp_path_factory.mktemp("hosts"))
        hosts.key.touch(0o600)
        hosts.key.write_text("k" * 32)
        yield hosts


@pytest.fixture(scope="module")
def server(hosts: Hosts) -> Iterator[Server]:
    """Has no decode worker of its own, so it is not up before one has joined, which waits for it in turn."""
    listen = ("--listen", f"{hosts.near.address}:{PORT}", "--tls", "--key-file", str(hosts.key))
    with contextlib.ExitStack() as stack:
        with hosts.worker() as process:
            server = stack.enter_context(serving(*SCRIPTED, "--prefill", "1", "--decode", "0", *listen))
            leave(process)
        yield server


def check_answers(server: Server, number: int) -> None:
    chance = random.Random(number)
    prompts = [[chance.randrange(32, 127) for _ in range(chance.randrange(1, 1500))] for _ in range(number)]
    answers = server.complete_all(prompts, "split", in_flight=8, max_tokens=20)
    assert [answer.token_ids for answer in answers] == [expected_tokens(prompt, 20) for prompt in prompts]
    assert {answer.route for answer in answers} == {ROUTE}
    soon(lambda: is_idle(server), "all blocks are given back")


def far_serves(server: Server, above: int = 0) -> int:
    """Wait until `far` gets split requests (one that has died before is tried out first); returns its epoch."""
    epoch = ready(server, "far", above)
    soon(lambda: server.complete(PROMPT, "split", max_tokens=4).route == ROUTE, "it is trusted")
    return epoch


def test_answers_across_hosts_are_exact(hosts: Hosts, server: Server) -> None:
    with hosts.worker():
        far_serves(server)
        assert {name: worker["role"] for name, worker in server.fleet().items()} == {
            "far": "decode",
            "prefill-0": "prefill",
        }
        check_answers(server, 24)


@pytest.mark.fault(32)
def test_a_worker_that_is_killed_is_missed_and_comes_back_in_a_new_life(hosts: Hosts, server: Server) -> None:
    with hosts.worker() as process:
        epoch = far_serves(server)
        with server.stream(PROMPT, "split", max_tokens=400) as stream:
            assert stream.route == ROUTE
            token_ids = [next(stream.token_ids) for _ in range(5)]
            process.kill()
            token_ids += stream.token_ids
        assert (token_ids, stream.done) == (expected_tokens(PROMPT, 400), True)  # its log is continued on `near`
    soon(lambda: list(server.fleet()) == ["prefill-0"], "it is missed")
    assert server.complete(PROMPT, max_tokens=5).route == "local=prefill-0"
    with hosts.worker():
        far_serves(server, above=epoch)
        check_answers(server, 8)


@pytest.mark.fault(37)
def test_a_worker_that_leaves_finishes_its_streams(hosts: Hosts, server: Server) -> None:
    with hosts.worker() as process:
        far_serves(server)
        with server.stream(PROMPT, "split", max_tokens=300) as stream:
            token_ids = [next(stream.token_ids)]
            process.terminate()
            soon(lambda: server.fleet().get("far", {}).get("state") != "ready", "it says so, or has left already")
            assert server.complete(PROMPT, "split", max_tokens=5).route == "local=prefill-0"
            token_ids += stream.token_ids
        assert (token_ids, stream.done) == (expected_tokens(PROMPT, 300), True)
        assert process.wait(30) == 0
    soon(lambda: list(server.fleet()) == ["prefill-0"], "it is gone")


def test_another_key_is_refused(hosts: Hosts, server: Server, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch(0o600)
    other.write_text("x" * 32)
    with hosts.far.entered():
        line = refused(tmp_path / "log", *hosts.flags, "--key-file", str(other), "--tls")
    assert "does not hold this fleet's key" in line
    assert list(server.fleet()) == ["prefill-0"]


def test_plain_text_is_refused_on_both_sides(hosts: Hosts, server: Server, tmp_path: Path) -> None:
    with hosts.far.entered():
        line = refused(tmp_path / "log", *hosts.flags, "--key-file", str(hosts.key))
        assert line == (
            f"diptych: {hosts.near.address} is not a loopback address; "
            "channels between hosts need TLS (--tls on both sides)"
        )
        with socket.create_connection((hosts.near.address, PORT), timeout=10) as stranger:
            stranger.sendall(handshake.ConnectorSide(hosts.key.read_bytes()).opening)
            answer = stranger.recv(1 << 16)
    assert answer[:1] in (b"", b"\x15")  # nothing, or a TLS alert
    assert list(server.fleet()) == ["prefill-0"]
