"""What strangers can hold: connections, framing, time; and that they cannot smuggle."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from front_fakes import FakeDispatcher, front_app, running_front, until

from diptych.core.errors import ConfigError
from diptych.front import server as front_server
from diptych.front.http_protocol import ConnectionLimits
from diptych.front.server import bind, connection_limits, serve
from diptych.front.tokenizer import ByteTokenizer

BODY = b'{"model": "tiny", "prompt": "a", "max_tokens": 2}'
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
SMUGGLED = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"


class Client:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, url: str) -> Client:
        host, port = url.removeprefix("http://").split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Everything until the server closes: status, headers and body of the first response."""
        answer = await self.reader.read()
        self.writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        return int(lines[0].split(" ")[1]) if head else 0, headers, body


def play(script: Callable[[str], Awaitable[None]], limits: ConnectionLimits | None = None, **settings: object) -> None:
    async def run() -> None:
        async with asyncio.timeout(30), running_front(FakeDispatcher(), connections=limits, **settings) as url:
            await script(url)

    asyncio.run(run())


async def exchange(url: str, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    client = await Client.connect(url)
    client.writer.write(sent)
    return await client.answer()


def code(body: bytes) -> str:
    return str(json.loads(body)["error"]["code"])


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    "head",
    [
        b"transfer-encoding: chunked\r\ncontent-length: 4\r\n",
        b"content-length: 4\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"transfer-encoding : chunked\r\n",
        b"content-length: 4\r\ncontent-length: 4, 4\r\n",
        b"content-length: +4\r\n",
        b"content-length: 0x4\r\n",
        b"content-length: 4\r\n folded\r\n",
        b"a\0b: 1\r\n",
        b"a: b\rcontent-length: 4\r\n",
    ],
)
def test_framing_that_two_parsers_could_read_differently(head: bytes) -> None:
    """400, closed, and what follows is not taken for a request."""

    async def script(url: str) -> None:
        status, headers, body = await exchange(url, POST + head + b"\r\n0\r\n\r\n" + SMUGGLED)
        assert (status, headers["connection"], code(body)) == (400, "close", "invalid_http")
        assert b"HTTP/1.1" not in body

    play(script)


@pytest.mark.fault(20)
@pytest.mark.parametrize("size", [b"-1", b"0x1", b"1 1", b"g", b"fffffffffffffffff", b"", b"+1"])
def test_chunk_sizes_that_are_none(size: bytes) -> None:
    async def script(url: str) -> None:
        status, headers, body = await exchange(url, POST + b"transfer-encoding: chunked\r\n\r\n" + size + b"\r\nab")
        assert (status, headers["connection"], code(body)) == (400, "close", "invalid_http")

    play(script)


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    "framing",
    [
        b"1;" + b"x" * 200_000 + b"\r\n{\r\n",
        b"0\r\n" + b"a: " + b"x" * 200_000,
        b"0\r\n" + b"a: b\r\n" * 5000,
        b"".join(b"1;%b\r\n \r\n" % (b"x" * 100) for _ in range(10_000)),
    ],
    ids=["extension", "trailer", "trailers", "extensions"],
)
def test_a_body_that_is_mostly_framing(framing: bytes) -> None:
    async def script(url: str) -> None:
        status, headers, body = await exchange(url, POST + b"transfer-encoding: chunked\r\n\r\n" + framing)
        assert status in (400, 431)
        assert headers["connection"] == "close"

    play(script)


def test_small_chunks_are_fine() -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY.ljust(30_000)) + b"0\r\n\r\n"
    head = POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"

    async def script(url: str) -> None:
        assert (await exchange(url, head + chunks))[0] == 200

    play(script)


@pytest.mark.fault(20)
def test_many_small_headers() -> None:
    async def script(url: str) -> None:
        for count, expected in ((100, 200), (129, 431), (5000, 431)):
            head = POST + b"".join(b"x%d: 1\r\n" % i for i in range(count)) + b"connection: close\r\n"
            status, _, body = await exchange(url, head + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
            assert status == expected
            assert expected == 200 or code(body) == "request_head_too_large"

    play(script)


@pytest.mark.fault(24)
@pytest.mark.fault(25)
def test_connections_beyond_the_limit_are_told_so_and_others_go_on() -> None:
    async def script(url: str) -> None:
        idle = [await Client.connect(url) for _ in range(3)]
        status, headers, body = await exchange(url, POST + b"\r\n")
        assert (status, headers["connection"], code(body)) == (503, "close", "too_many_connections")
        assert int(headers["retry-after"]) > 0
        idle[0].writer.write(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY)
        assert (await idle[0].answer())[0] == 200
        assert (await exchange(url, SMUGGLED.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")))[0] == 200
        for client in idle[1:]:
            client.writer.close()

    play(script, ConnectionLimits(max_connections=3))


@pytest.mark.fault(21)
def test_slow_heads_and_bodies_are_cut_off() -> None:
    """A byte at a time buys nobody more than the deadline."""

    async def drip(client: Client, data: bytes) -> None:
        for byte in data:
            if client.reader.at_eof() or client.reader.exception() is not None:
                return
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0.02)

    async def script(url: str) -> None:
        slow_head, slow_body = await Client.connect(url), await Client.connect(url)
        slow_body.writer.write(POST + b"content-length: 1000\r\n\r\n")
        async with asyncio.TaskGroup() as group:
            group.create_task(drip(slow_head, POST * 5))
            group.create_task(drip(slow_body, b" " * 500))
            head, body = await asyncio.gather(slow_head.answer(), slow_body.answer(), return_exceptions=True)
        assert isinstance(head, ConnectionError) or head[0] == 0
        assert isinstance(body, ConnectionError) or (body[0], code(body[2])) == (408, "request_timeout")

    play(script, ConnectionLimits(head_seconds=0.3), body_timeout=0.3)


@pytest.mark.fault(21)
def test_the_rest_of_a_body_that_nobody_wants_is_not_waited_for() -> None:
    async def script(url: str) -> None:
        head = POST.replace(b"application/json", b"text/plain")
        status, _, body = await exchange(url, head + b"content-length: 1000\r\n\r\n{")
        assert (status, code(body)) == (415, "unsupported_media_type")

    play(script, ConnectionLimits(linger_seconds=0.05))


@pytest.mark.fault(22)
def test_a_client_that_never_reads_is_dropped_with_what_was_for_it() -> None:
    """More than every buffer on the way holds, and the window stays shut: the request is cancelled, and the
    connection does not wait for ever to get rid of the rest."""

    async def run() -> None:
        dispatcher = FakeDispatcher(lambda request: [97] * 10**6)
        dispatcher.model = replace(dispatcher.model, max_model_len=2 * 10**6)
        app = front_app(dispatcher, ByteTokenizer(), write_timeout=0.2)
        limits = ConnectionLimits(unread_seconds=0.2)
        async with asyncio.timeout(30), serve(app, bind("127.0.0.1", 0), grace_seconds=1, limits=limits) as server:
            host, port = server.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as sock:
                body = b'{"model": "tiny", "prompt": "a", "stream": true, "max_tokens": 1000000}'
                sock.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
                await dispatcher.submitted.wait()
                await dispatcher.streams[0].cancelled.wait()
                await until(lambda: not server.server_state.connections)

    asyncio.run(run())


@pytest.mark.fault(25)
def test_the_limit_on_files_is_raised_or_lowers_that_on_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (256, 256)}
    monkeypatch.setattr(front_server.resource, "getrlimit", lambda kind: limits["now"])
    monkeypatch.setattr(front_server.resource, "setrlimit", lambda kind, new: limits.update(now=new))
    assert connection_limits(1000).max_connections == 256 - front_server.RESERVED_FILES
    limits["now"] = (256, 4096)
    assert connection_limits(1000).max_connections == 1000
    assert limits["now"] == (1000 + front_server.RESERVED_FILES, 4096)
    limits["now"] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert connection_limits(1000).max_connections == 1000
    limits["now"] = (100, 150)
    with pytest.raises(ConfigError, match="ulimit -n"):
        connection_limits(1000)
