"""An authenticated, ordered, two-way stream of messages between two processes (asyncio).

async with a listener:  listen(address, key, on_channel, expects)   on_channel(channel) per connection
a caller:               channel = await connect(address, key, expects)

channel.send(message)            queues it; never blocks
async for message in channel     until the other end closes; raises ProtocolError if it breaks the rules (the caller
                                 closes, and may say why before)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

from diptych.core.errors import HandshakeError, PeerError
from diptych.wire import handshake
from diptych.wire.address import TcpAddress, UnixAddress, parse_address
from diptych.wire.codec import LENGTH, Decoder, encode_frame, frame_length
from diptych.wire.tls import SHUTDOWN_SECONDS, ListenerTls, binding_of, connector_context, listener_tls

log = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

MAX_UNSENT_BYTES = 64 << 20  # a peer that does not read for this long is given up
UNACKNOWLEDGED_SECONDS = 10  # after which a host that does not even acknowledge what was sent counts as gone


class Channel(Protocol[T_co]):
    """Sends anything, receives messages of type T_co."""

    def send(self, message: object) -> None: ...

    def __aiter__(self) -> AsyncIterator[T_co]: ...

    def close(self) -> None: ...


class StreamChannel(Generic[T]):
    """A channel over a socket, after the handshake."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, expects: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: Decoder[T] = Decoder(expects)

    def send(self, message: object) -> None:
        """Queue a message; the loop sends it. After the end of the channel it goes nowhere."""
        if self._writer.is_closing():
            return
        self._writer.write(encode_frame(message))
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            log.error("a peer has not read for %d bytes; closing its channel", MAX_UNSENT_BYTES)
            self._writer.transport.abort()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        try:
            header = await self._reader.readexactly(LENGTH.size)
            return self._decoder.decode(await self._reader.readexactly(frame_length(header)))
        except (asyncio.IncompleteReadError, OSError):
            self.close()
            raise StopAsyncIteration from None

    @property
    def local_host(self) -> str:
        """The address of this machine that the channel uses (TCP only)."""
        return str(self._writer.get_extra_info("sockname")[0])

    def close(self) -> None:
        """End the channel in both directions. Idempotent."""
        self._writer.close()


class MemoryChannel(Generic[T]):
    """A channel within one loop: what one end sends, encoded and decoded, arrives at the other."""

    def __init__(self, expects: Any) -> None:
        self._decoder: Decoder[T] = Decoder(expects)
        self._incoming: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._other: MemoryChannel[Any] | None = None

    def send(self, message: object) -> None:
        if self._other is not None:
            self._other._incoming.put_nowait(encode_frame(message)[LENGTH.size :])

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        content = await self._incoming.get()
        if content is None:
            raise StopAsyncIteration
        return self._decoder.decode(content)

    def close(self) -> None:
        other, self._other = self._other, None
        if other is not None:
            other._incoming.put_nowait(None)
            other.close()


def memory_pair(left_expects: Any, right_expects: Any) -> tuple[MemoryChannel[Any], MemoryChannel[Any]]:
    """Two connected ends."""
    left: MemoryChannel[Any] = MemoryChannel(left_expects)
    right: MemoryChannel[Any] = MemoryChannel(right_expects)
    left._other, right._other = right, left
    return left, right


async def connect(address: str, key: bytes, expects: Any) -> StreamChannel[Any]:
    """Open a channel. Raises HandshakeError, or OSError if nobody listens."""
    where = parse_address(address)
    try:
        reader, writer = await (_dial(where) if isinstance(where, TcpAddress) else _dial_unix(where))
    except (ssl.SSLError, ConnectionResetError, ConnectionAbortedError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else "the other end hung up"
        raise HandshakeError(f"no handshake with {address}: {reason}; is --tls given on both sides?") from error
    binding = b""
    if (secured := writer.get_extra_info("ssl_object")) is not None:
        binding = binding_of(secured.getpeercert(binary_form=True))
    side = handshake.ConnectorSide(key, binding)
    try:
        async with asyncio.timeout(handshake.SECONDS):
            writer.write(side.opening)
            writer.write(side.answer(await reader.readexactly(handshake.REPLY_BYTES)))
            if await reader.readexactly(1) != handshake.CONFIRMED:
                raise HandshakeError("the listener does not accept this fleet key")
    except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
        writer.close()
        hint = "is --tls given on both sides?"
        raise HandshakeError(f"no handshake with {address}: the other end closed or said nothing; {hint}") from error
    except HandshakeError:
        writer.close()
        raise
    return StreamChannel(reader, writer, expects)


async def _dial(where: TcpAddress) -> Streams:
    secure = _secure(connector_context()) if where.tls else {}
    async with asyncio.timeout(handshake.SECONDS):
        reader, writer = await asyncio.open_connection(where.host, where.port, **secure)
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_SECONDS * 1000)
    return reader, writer


def _secure(context: ssl.SSLContext) -> dict[str, Any]:
    """What asyncio wants to be told for a TLS connection."""
    return {
        "ssl": context,
        "ssl_handshake_timeout": handshake.SECONDS,
        "ssl_shutdown_timeout": SHUTDOWN_SECONDS,
    }


async def _dial_unix(where: UnixAddress) -> Streams:
    return await asyncio.open_unix_connection(where.path)


class Listener:
    """Accepts channels until closed; each is served by a task of its own."""

    def __init__(self, key: bytes, on_channel: Callable[[StreamChannel[Any]], Awaitable[None]], expects: Any) -> None:
        self._key = key
        self._on_channel = on_channel
        self._expects = expects
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._tls: ListenerTls | None = None
        self.address = ""
        self.refused = 0  # connections that failed the handshake or broke the protocol

    async def open(self, address: str) -> None:
        where = parse_address(address)
        if isinstance(where, TcpAddress):
            self._tls = listener_tls(address)
            secure = _secure(self._tls.context) if self._tls else {}
            self._server = await asyncio.start_server(self._accept, where.host, where.port, **secure)
            self.address = str(replace(where, port=self._server.sockets[0].getsockname()[1]))
        else:
            self._server = await asyncio.start_unix_server(self._accept, where.path)
            os.chmod(where.path, 0o600)
            self.address = address

    async def close(self) -> None:
        """Stop accepting, end the channels' tasks."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:  # by `close`; raised on, asyncio's own callback would log a traceback
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._prove(reader, writer)
            await self._on_channel(StreamChannel(reader, writer, self._expects))
        except (PeerError, asyncio.IncompleteReadError, OSError) as error:
            self.refused += 1
            log.warning("a connection to %s ended: %s", self.address, str(error) or "it said nothing")
        finally:
            writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def _prove(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side = handshake.ListenerSide(self._key, self._tls.binding if self._tls else b"")
        async with asyncio.timeout(handshake.SECONDS):
            writer.write(side.reply(await reader.readexactly(handshake.OPENING_BYTES)))
            side.check(await reader.readexactly(handshake.PROOF_BYTES))
            writer.write(handshake.CONFIRMED)


async def listen(
    address: str, key: bytes, on_channel: Callable[[StreamChannel[Any]], Awaitable[None]], expects: Any
) -> Listener:
    """Accept channels at `address` (port 0 takes a free one; see Listener.address)."""
    listener = Listener(key, on_channel, expects)
    await listener.open(address)
    return listener
