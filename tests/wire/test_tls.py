"""TLS between hosts: encrypted, and bound to the fleet's key, so that nobody can sit in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from diptych.core.errors import HandshakeError
from diptych.transfer.frames import FromSource, FromTarget, Go
from diptych.wire import blocking, handshake
from diptych.wire.blocking import BlockingConnection, accept, dial, listening_socket
from diptych.wire.channel import StreamChannel, connect, listen
from diptych.wire.handshake import ConnectorSide, ListenerSide
from diptych.wire.messages import FromWorker, ToWorker
from diptych.wire.tls import connector_context, listener_tls

KEY = b"k" * 32
ANYWHERE = "tls:127.0.0.1:0"


@contextlib.contextmanager
def thread(work: Callable[[], Any]) -> Iterator[None]:
    running = threading.Thread(target=work, daemon=True)
    running.start()
    yield
    running.join(10)
    assert not running.is_alive()


@contextlib.contextmanager
def joined() -> Iterator[tuple[BlockingConnection[Any], BlockingConnection[Any]]]:
    listener, address = listening_socket(ANYWHERE)
    with listener, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(lambda: accept(listener.accept()[0], KEY, FromSource, listener_tls(address)))
        source = dial(address, KEY, FromTarget)
        target = accepted.result(10)
    with contextlib.closing(source), contextlib.closing(target):
        yield source, target


def test_every_listener_has_a_certificate_of_its_own() -> None:
    first, second = listener_tls(ANYWHERE), listener_tls(ANYWHERE)
    assert first is not None
    assert second is not None
    assert first.binding != second.binding
    assert listener_tls("tcp:127.0.0.1:0") is None
    assert listener_tls("unix:/s") is None


def test_proofs_count_for_one_certificate_only() -> None:
    connector, listener = ConnectorSide(KEY, b"a" * 32), ListenerSide(KEY, b"b" * 32)
    reply = listener.reply(connector.opening)
    with pytest.raises(HandshakeError, match="the listener does not hold"):
        connector.answer(reply)
    honest = ConnectorSide(KEY, b"b" * 32)
    answer = honest.answer(listener.reply(honest.opening))
    listener.check(answer)
    plain = ListenerSide(KEY)
    plain.reply(honest.opening)
    with pytest.raises(HandshakeError, match="the caller does not hold"):
        plain.check(answer)


class Middle:
    """Ends TLS towards the caller with a certificate of its own, and passes everything on over TLS."""

    def __init__(self, behind: tuple[str, int]) -> None:
        self.behind = behind
        self.seen = b""
        self.listener, self.address = listening_socket(ANYWHERE)

    def run(self) -> None:
        tls = listener_tls(self.address)
        assert tls is not None
        with (
            contextlib.suppress(OSError),
            tls.context.wrap_socket(self.listener.accept()[0], server_side=True) as caller,
            connector_context().wrap_socket(socket.create_connection(self.behind)) as onward,
        ):
            opening = caller.recv(handshake.OPENING_BYTES)
            onward.sendall(opening)
            caller.sendall(onward.recv(handshake.REPLY_BYTES))
            self.seen = caller.recv(handshake.PROOF_BYTES)


def test_a_man_in_the_middle_of_a_data_connection_is_noticed() -> None:
    listener, address = listening_socket(ANYWHERE)
    with listener, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(lambda: accept(listener.accept()[0], KEY, FromSource, listener_tls(address)))
        middle = Middle(listener.getsockname())
        with middle.listener, thread(middle.run), pytest.raises(HandshakeError, match="does not hold"):
            dial(middle.address, KEY, FromTarget)
        assert middle.seen == b""  # the caller gave no proof
        with pytest.raises(HandshakeError):
            accepted.result(10)


def test_a_man_in_the_middle_of_a_control_channel_is_noticed() -> None:
    async def run() -> None:
        async def nobody(channel: StreamChannel[Any]) -> None:
            raise AssertionError("somebody got in")

        listener = await listen(ANYWHERE, KEY, nobody, FromWorker)
        middle = Middle(("127.0.0.1", int(listener.address.rpartition(":")[2])))
        with middle.listener:
            between = asyncio.create_task(asyncio.to_thread(middle.run))
            with pytest.raises(HandshakeError, match="does not hold"):
                await connect(middle.address, KEY, ToWorker)
            await between
        assert middle.seen == b""
        await listener.close()
        assert listener.refused == 1

    asyncio.run(run())


def test_a_listener_without_tls_is_told_from_one_that_is_not_there() -> None:
    async def run() -> None:
        async def nobody(channel: StreamChannel[Any]) -> None:
            raise AssertionError("somebody got in")

        listener = await listen("tcp:127.0.0.1:0", KEY, nobody, FromWorker)
        there = listener.address.replace("tcp:", "tls:")
        with pytest.raises(HandshakeError, match="is --tls given on both sides"):
            await connect(there, KEY, ToWorker)
        await listener.close()
        with pytest.raises(ConnectionRefusedError):
            await connect(there, KEY, ToWorker)

    asyncio.run(run())


def test_nothing_can_be_read_on_the_wire() -> None:
    """What the listener's end of the TCP stream carries is not what was sent."""
    secret = b"the page's bytes" * 100
    listener, address = listening_socket(ANYWHERE)
    taken = bytearray()

    def tap(ends: tuple[socket.socket, socket.socket]) -> None:
        while data := ends[0].recv(1 << 16):
            taken.extend(data)
            ends[1].sendall(data)
        ends[1].shutdown(socket.SHUT_WR)

    front, tapped = listening_socket(ANYWHERE)
    with listener, front, ThreadPoolExecutor(4) as pool:
        accepted = pool.submit(lambda: accept(listener.accept()[0], KEY, FromSource, listener_tls(address)))
        dialled = pool.submit(dial, tapped, KEY, FromTarget)
        caller = front.accept()[0]
        onward = socket.create_connection(listener.getsockname())
        pipes = [pool.submit(tap, (caller, onward)), pool.submit(tap, (onward, caller))]
        source, target = dialled.result(10), accepted.result(10)
        source.send(Go("r", b"n"), [memoryview(secret)])
        target._decoder = source._decoder  # whichever message: it only has to come through
        assert target.receive() == Go("r", b"n")
        arrived = bytearray(len(secret))
        target.receive_into(memoryview(arrived))
        assert arrived == secret
        source.close()
        target.close()
        for pipe in pipes:
            pipe.result(10)
        caller.close()
        onward.close()
    assert len(taken) > len(secret)
    assert secret[:16] not in taken
    assert handshake.MAGIC not in taken


def test_both_directions_at_once() -> None:
    """One thread sends while another receives, on both ends; neither waits for the other."""
    payload = os.urandom(8 << 20)
    with joined() as (source, target), ThreadPoolExecutor(4) as pool:

        def take(end: BlockingConnection[Any]) -> bytes:
            buffer = bytearray(len(payload))
            end.receive_into(memoryview(buffer))
            return bytes(buffer)

        taken = [pool.submit(take, end) for end in (source, target)]
        sent = [pool.submit(end._send_all, [memoryview(payload)]) for end in (source, target)]
        for future in sent:
            future.result(60)
        assert [future.result(60) for future in taken] == [payload, payload]


def test_a_stalled_peer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "STALL_SECONDS", 0.2)
    with joined() as (source, target):
        with pytest.raises(TimeoutError):
            target.receive_into(memoryview(bytearray(1)))
        with pytest.raises(TimeoutError):
            source._send_all([memoryview(bytes(64 << 20))])


def test_an_end_from_another_thread_wakes_a_reader() -> None:
    with joined() as (source, target), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(target.receive)
        target.end()
        assert waiting.result(10) is None
        assert source.receive() is None


@pytest.mark.parametrize("said", [b"", handshake.MAGIC + bytes(32), b"GET / HTTP/1.1\r\n\r\n"])
def test_plain_text_is_turned_away(said: bytes) -> None:
    listener, address = listening_socket(ANYWHERE)
    with listener, socket.create_connection(listener.getsockname()) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        with pytest.raises(HandshakeError, match="turned away"):
            accept(listener.accept()[0], KEY, FromSource, listener_tls(address))


def test_a_plain_listener_is_not_talked_to() -> None:
    listener, address = listening_socket("tcp:127.0.0.1:0")
    with listener, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(lambda: accept(listener.accept()[0], KEY, FromSource))
        with pytest.raises(HandshakeError, match="no handshake"):
            dial(address.replace("tcp", "tls"), KEY, FromTarget)
        with pytest.raises(HandshakeError, match="does not speak"):
            accepted.result(10)
