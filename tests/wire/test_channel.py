"""Channels: messages in order both ways, for whoever holds the key; a stranger costs its own connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diptych.core.errors import ConfigError, HandshakeError, ProtocolError
from diptych.wire import handshake
from diptych.wire.channel import Listener, StreamChannel, connect, listen, memory_pair
from diptych.wire.codec import LENGTH, encode_frame
from diptych.wire.messages import Abort, Failed, FromWorker, Shutdown, ToWorker

KEY = b"k" * 32
Serving = Callable[[Listener], Awaitable[None]]


async def echo(channel: StreamChannel[Any]) -> None:
    """The router's end: every failure comes back as an abort."""
    async for message in channel:
        channel.send(Abort(message.request_id))


def serving(address: str, test: Serving) -> None:
    async def run() -> None:
        listener = await listen(address, KEY, echo, FromWorker)
        try:
            await test(listener)
        finally:
            await listener.close()

    asyncio.run(run())


async def works(listener: Listener) -> None:
    """A well-behaved peer is served."""
    channel = await connect(listener.address, KEY, ToWorker)
    for number in range(3):
        channel.send(Failed(f"r{number}", "code", "why"))
    for number in range(3):
        assert await anext(channel) == Abort(f"r{number}")
    channel.close()


async def raw(listener: Listener) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    _, host, port = listener.address.split(":")
    return await asyncio.open_connection(host, int(port))


@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_messages_go_both_ways_in_order_over_tcp(kind: str) -> None:
    serving(f"{kind}:127.0.0.1:0", works)


def test_messages_go_both_ways_in_order_over_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def test(listener: Listener) -> None:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        await works(listener)

    serving(f"unix:{path}", test)


@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_the_wrong_key_is_noticed_by_the_caller_and_counted_by_the_listener(kind: str) -> None:
    async def test(listener: Listener) -> None:
        with pytest.raises(HandshakeError, match="does not hold"):
            await connect(listener.address, b"x" * 32, ToWorker)
        await works(listener)
        assert listener.refused == 1

    serving(f"{kind}:127.0.0.1:0", test)


def test_the_listeners_own_proof_sent_back_is_no_proof() -> None:
    async def test(listener: Listener) -> None:
        reader, writer = await raw(listener)
        writer.write(handshake.MAGIC + b"a" * handshake.NONCE_BYTES)
        reply = await reader.readexactly(handshake.REPLY_BYTES)
        writer.write(reply[handshake.NONCE_BYTES :])
        assert await reader.read() == b""
        writer.close()
        assert listener.refused == 1

    serving("tcp:127.0.0.1:0", test)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"z" * handshake.REPLY_BYTES, "listener does not hold"),
        (b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n", "--listen"),
    ],
    ids=["imposter", "web server"],
)
def test_a_listener_without_the_key_is_refused(reply: bytes, words: str) -> None:
    async def imposter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await reader.readexactly(handshake.OPENING_BYTES)
            writer.write(reply)
            await reader.read()

    async def run() -> None:
        server = await asyncio.start_server(imposter, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(HandshakeError, match=words):
                await connect(f"tcp:127.0.0.1:{port}", KEY, ToWorker)

    asyncio.run(run())


def test_a_caller_that_says_nothing_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "SECONDS", 0.01)

    async def test(listener: Listener) -> None:
        reader, writer = await raw(listener)
        writer.write(handshake.MAGIC)
        assert await reader.read() == b""
        writer.close()
        assert listener.refused == 1

    serving("tcp:127.0.0.1:0", test)


@pytest.mark.fault(61)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=120))
@example(handshake.MAGIC + bytes(64))
def test_random_bytes_from_a_stranger_cost_only_that_connection(data: bytes) -> None:
    async def test(listener: Listener) -> None:
        reader, writer = await raw(listener)
        writer.write(data)
        with contextlib.suppress(ConnectionError):  # what the listener has not read, it resets
            writer.write_eof()
            await reader.read()
        writer.close()
        await works(listener)
        assert listener.refused == 1

    serving("tcp:127.0.0.1:0", test)


@pytest.mark.fault(61)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(min_size=1, max_size=60))
@example((1 << 31).to_bytes(4, "big"))
def test_garbage_from_a_peer_with_the_key_costs_only_that_connection(data: bytes) -> None:
    async def test(listener: Listener) -> None:
        channel = await connect(listener.address, KEY, ToWorker)
        channel._writer.write(LENGTH.pack(len(data)) + b"\xc1" + data[1:])
        with pytest.raises(StopAsyncIteration):
            await anext(channel)
        channel.close()
        await works(listener)
        assert listener.refused == 1

    serving("tcp:127.0.0.1:0", test)


def test_a_frame_above_the_maximum_is_refused_before_it_is_read() -> None:
    async def test(listener: Listener) -> None:
        channel = await connect(listener.address, KEY, ToWorker)
        channel._writer.write(b"\xff\xff\xff\xff")
        with pytest.raises(StopAsyncIteration):
            await anext(channel)
        channel.close()
        assert listener.refused == 1

    serving("tcp:127.0.0.1:0", test)


def test_garbage_from_the_listener_is_a_protocol_error() -> None:
    async def run() -> None:
        async def babble(channel: StreamChannel[Any]) -> None:
            channel.send({"no": "message"})

        listener = await listen("tcp:127.0.0.1:0", KEY, babble, FromWorker)
        channel = await connect(listener.address, KEY, ToWorker)
        with pytest.raises(ProtocolError):
            await anext(channel)
        channel.close()
        channel.send(Shutdown())  # goes nowhere, and harms nobody
        await listener.close()

    asyncio.run(run())


def test_addresses_beyond_this_machine_are_refused() -> None:
    with pytest.raises(ConfigError, match="TLS"):
        asyncio.run(connect("tcp:10.0.0.1:1", KEY, ToWorker))


def test_a_memory_pair_encodes_and_ends_like_a_real_channel() -> None:
    async def run() -> None:
        worker, router = memory_pair(ToWorker, FromWorker)
        worker.send(Failed("r1", "code", "why"))
        router.send(Abort("r1"))
        assert await anext(router) == Failed("r1", "code", "why")
        assert await anext(worker) == Abort("r1")
        worker.send(Abort("r1"))  # not a worker's word
        with pytest.raises(ProtocolError):
            await anext(router)
        router.close()
        assert [message async for message in worker] == []
        worker.send(Failed("r1", "code", "why"))

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_messages_larger_than_the_stream_buffer_arrive(kind: str) -> None:
    async def test(listener: Listener) -> None:
        channel = await connect(listener.address, KEY, ToWorker)
        long_id = "r" * (1 << 20)
        assert len(encode_frame(Abort(long_id))) > 1 << 20
        channel.send(Failed(long_id, "code", "why"))
        assert await anext(channel) == Abort(long_id)
        channel.close()

    serving(f"{kind}:127.0.0.1:0", test)
