"""The server around the application: binding, bounds on heads and bodies, odd but legal HTTP."""

from __future__ import annotations

import asyncio
import json

import pytest
from front_fakes import FakeDispatcher, front_app, running_front

from diptych.core.errors import ConfigError
from diptych.front.http_protocol import ConnectionLimits
from diptych.front.server import bind, serve

BODY = b'{"model": "tiny", "prompt": "a", "max_tokens": 2}'
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


async def exchange(url: str, sent: bytes, close: bool = True) -> tuple[int, bytes]:
    """Send bytes, read until the server closes. Returns status and body."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    async with asyncio.timeout(20):
        answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]) if head else 0, body


def send(sent: bytes, **settings: object) -> tuple[int, bytes]:
    async def run() -> tuple[int, bytes]:
        async with running_front(FakeDispatcher(), **settings) as url:
            return await exchange(url, sent)

    return asyncio.run(run())


def with_length(head: bytes, body: bytes) -> bytes:
    return head + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body


def test_plain_request() -> None:
    status, body = send(with_length(POST, BODY))
    assert status == 200
    assert json.loads(body)["choices"][0]["finish_reason"] == "length"


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    "head", [POST.replace(b"HTTP/1.1", b"HTTP/1.0"), POST.replace(b"/v1", b"http://other/v1")], ids=["1.0", "absolute"]
)
def test_old_and_absolute_forms(head: bytes) -> None:
    assert send(with_length(head, BODY))[0] == 200


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"content-length: -1\r\n\r\n",
        b"bad header\r\n\r\n",
    ],
)
def test_ambiguous_framing_is_refused(head: bytes) -> None:
    status, body = send(POST + head)
    assert status == 400
    assert json.loads(body)["error"]["code"] == "invalid_http"


@pytest.mark.fault(20)
@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
@pytest.mark.parametrize("lines", [b"x-big: " + b"a" * 1_000_000, b"x-many: 1\r\n" * 10_000], ids=["one", "many"])
def test_large_heads_are_refused(lines: bytes, end: bytes) -> None:
    async def run() -> tuple[int, bytes]:
        async with running_front(FakeDispatcher()) as url:
            try:
                return await exchange(url, POST + lines + end)
            except ConnectionError:  # the rest of the head met a closed connection before the answer was read
                return 431, b""

    status, body = asyncio.run(run())
    assert status == 431
    assert not body or json.loads(body)["error"]["code"] == "request_head_too_large"


@pytest.mark.fault(2)
def test_bodies_over_the_limit_are_refused_unread() -> None:
    async def run() -> None:
        async with running_front(FakeDispatcher(), max_body_bytes=1000) as url:
            declared = await exchange(url, POST + b"content-length: 1000000000\r\n\r\n")
            chunk = b"400\r\n" + b" " * 0x400 + b"\r\n"
            chunked = await exchange(url, POST + b"transfer-encoding: chunked\r\n\r\n" + chunk)
            assert declared[0] == chunked[0] == 413
            assert json.loads(declared[1])["error"]["code"] == "request_too_large"

    asyncio.run(run())


@pytest.mark.fault(21)
def test_body_that_does_not_come() -> None:
    status, body = send(POST + b"content-length: 100\r\n\r\n{", body_timeout=0.05)
    assert status == 408
    assert json.loads(body)["error"]["code"] == "request_timeout"


@pytest.mark.fault(21)
def test_head_that_does_not_come() -> None:
    limits = ConnectionLimits(head_seconds=0.05)
    assert send(POST, connections=limits) == (0, b"")
    assert send(b"", connections=limits) == (0, b"")


def test_two_requests_on_one_connection() -> None:
    async def run() -> bytes:
        async with running_front(FakeDispatcher()) as url:
            host, port = url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            first = POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
            writer.write(first + with_length(POST, BODY))
            answer = await reader.read()
            writer.close()
            return answer

    assert asyncio.run(run()).count(b"HTTP/1.1 200 OK") == 2


def test_port_in_use_names_the_flag() -> None:
    async def run() -> None:
        app = front_app(FakeDispatcher())
        async with serve(app, bind("127.0.0.1", 0)) as server:
            port = int(server.url.rpartition(":")[2])
            with pytest.raises(ConfigError, match=f"port {port} .*--port"):
                async with serve(app, bind("127.0.0.1", port)):
                    pass

    asyncio.run(run())


@pytest.mark.parametrize(("host", "port", "flag"), [("192.0.2.1", 0, "--host"), ("127.0.0.1", 70000, "--port")])
def test_addresses_that_cannot_be_had(host: str, port: int, flag: str) -> None:
    async def run() -> None:
        async with serve(front_app(FakeDispatcher()), bind(host, port)):
            pass

    with pytest.raises(ConfigError, match=flag):
        asyncio.run(run())


def test_running_answers_get_their_grace() -> None:
    async def run() -> int:
        gate = asyncio.Event()
        dispatcher = FakeDispatcher(gates={1: gate})
        app = front_app(dispatcher)
        async with serve(app, bind("127.0.0.1", 0), grace_seconds=10) as server:
            asking = asyncio.create_task(exchange(server.url, with_length(POST, BODY)))
            await dispatcher.submitted.wait()
            asyncio.get_running_loop().call_later(0.05, gate.set)
        return (await asking)[0]

    assert asyncio.run(run()) == 200


def test_answers_that_outlive_the_grace_are_cancelled() -> None:
    async def run() -> None:
        dispatcher = FakeDispatcher(gates={1: asyncio.Event()})
        async with serve(front_app(dispatcher), bind("127.0.0.1", 0), grace_seconds=0.05) as server:
            asking = asyncio.create_task(exchange(server.url, with_length(POST, BODY)))
            await dispatcher.submitted.wait()
        await dispatcher.streams[0].cancelled.wait()
        await asyncio.wait([asking])
        asking.exception()

    asyncio.run(run())
