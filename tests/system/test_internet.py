"""A real server among strangers: tenants, slow and silent clients, too many connections."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import ENVIRONMENT, SCRIPTED, START_SECONDS, Server, is_idle, processes, serving, soon

from diptych.engine.scripted import expected_tokens

PROMPT = list(b"heron 471 . maple 902 . ? heron " * 8)
TENANTS = """
[[tenant]]
name = "one"
keys = ["sk-one"]
max_requests = 2

[[tenant]]
name = "two"
keys = ["sk-two"]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    file.write_text(TENANTS)
    with serving(*SCRIPTED, "--tenants", str(file), "--max-connections", "150") as server:
        yield server


def use_key(server: Server, key: str) -> None:
    server.http.headers["authorization"] = f"Bearer {key}"


def connect(server: Server) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)


@pytest.mark.fault(57)
def test_one_tenants_cache_is_no_help_to_another(server: Server) -> None:
    cached = {}
    for key in ("sk-one", "sk-one", "sk-two", "sk-two"):
        use_key(server, key)
        answer = server.complete(PROMPT, max_tokens=4)
        assert answer.token_ids == expected_tokens(PROMPT, 4)
        cached.setdefault(key, []).append(answer.cached_tokens)
    assert [counts[0] for counts in cached.values()] == [0, 0]
    assert all(counts[1] > 0 for counts in cached.values())


@pytest.mark.fault(56)
def test_a_tenants_limit_is_its_own(server: Server) -> None:
    use_key(server, "sk-one")
    with server.stream(PROMPT, max_tokens=1000) as first, server.stream(PROMPT, max_tokens=1000) as second:
        next(first.token_ids), next(second.token_ids)
        refused = server.http.post("/v1/completions", json=server.body(PROMPT, max_tokens=1))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "tenant_requests")
        assert int(refused.headers["retry-after"]) >= 1
        use_key(server, "sk-two")
        assert server.complete(PROMPT, max_tokens=4).token_ids == expected_tokens(PROMPT, 4)
    soon(lambda: is_idle(server), "both are cancelled")
    metrics = server.http.get("/metrics").text
    assert 'diptych_refused_total{reason="tenant_requests"} 1.0' in metrics


@pytest.mark.fault(21, 24)
def test_a_crowd_that_holds_connections_harms_nobody(server: Server) -> None:
    """As many as fit, each in the middle of a head; those beyond are told so, and who is in goes on."""
    use_key(server, "sk-two")
    with contextlib.ExitStack() as stack:
        assert server.complete(PROMPT, max_tokens=4).token_ids == expected_tokens(PROMPT, 4)
        crowd = [stack.enter_context(contextlib.closing(connect(server))) for _ in range(160)]
        answers = []
        for sock in crowd:
            with contextlib.suppress(ConnectionError):
                sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
        for sock in crowd[-5:]:
            answers.append(sock.recv(65536))
        assert all(answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in answer for answer in answers)
        assert server.complete(PROMPT, max_tokens=50).token_ids == expected_tokens(PROMPT, 50)
    soon(lambda: can_connect(server), "there is room again")


def can_connect(server: Server) -> bool:
    with contextlib.closing(connect(server)) as sock:
        sock.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        return sock.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.fault(22)
def test_a_client_that_does_not_read_holds_nothing_for_long(server: Server) -> None:
    """Its answer is computed, its blocks come back, and others are served; what is left to send is bounded."""
    body = server.body(PROMPT, max_tokens=2000, stream=True, n=1)
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-two\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    with contextlib.closing(connect(server)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(head.encode() + content)
        soon(lambda: not is_idle(server), "it is served")
        use_key(server, "sk-two")
        assert server.complete(PROMPT, max_tokens=4).token_ids == expected_tokens(PROMPT, 4)
    soon(lambda: is_idle(server), "nothing is held")


@pytest.mark.fault(25)
def test_too_few_files_are_an_error_at_start() -> None:
    command = f"ulimit -n 150; exec {sys.executable} -m diptych serve --engine scripted --port 0"
    result = subprocess.run(
        ("sh", "-c", command), env=ENVIRONMENT, capture_output=True, text=True, timeout=START_SECONDS
    )
    assert result.returncode == 1
    assert "ulimit -n" in result.stderr


@pytest.mark.fault(64)
def test_nothing_listens_but_what_was_announced(server: Server) -> None:
    """TCP sockets in state LISTEN of the server's processes (proc(5)): the front, and where decode workers take
    pages in, all of them on loopback."""
    inodes = set()
    for pid in server.processes():
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(link.readlink()))
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                listening.append((address, int(port, 16)))
    assert {address for address, _ in listening} == {"0100007F"}  # 127.0.0.1
    assert int(server.url.rpartition(":")[2]) in {port for _, port in listening}
    assert len(listening) <= 1 + len(server.fleet())
    assert processes.still_alive(server.processes())
