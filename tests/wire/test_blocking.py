"""Blocking connections: messages, raw payload and descriptors between threads."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_examples import FROM_SOURCE, FROM_TARGET

from diptych.core.errors import ConfigError, HandshakeError, ProtocolError
from diptych.transfer.frames import FromSource, FromTarget, Go
from diptych.wire import blocking, handshake
from diptych.wire.blocking import MAX_CONTROL_BYTES, BlockingConnection, accept, dial, listening_socket
from diptych.wire.codec import LENGTH, encode_frame
from diptych.wire.tls import listener_tls

KEY = b"k" * 32
TRANSPORTS = ("unix", "tcp", "tls")


@contextlib.contextmanager
def listening(transport: str, directory: Path) -> Iterator[tuple[socket.socket, str]]:
    wanted = f"unix:{directory / 's'}" if transport == "unix" else f"{transport}:127.0.0.1:0"
    sock, address = listening_socket(wanted)
    with sock:
        yield sock, address


def accepting(listener: socket.socket, address: str, key: bytes = KEY) -> Future[BlockingConnection[Any]]:
    """Serve the next caller, on a thread."""
    future: Future[BlockingConnection[Any]] = Future()
    tls = listener_tls(address)

    def work() -> None:
        try:
            future.set_result(accept(listener.accept()[0], key, FromSource, tls))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


@contextlib.contextmanager
def joined(transport: str, directory: Path) -> Iterator[tuple[BlockingConnection[Any], BlockingConnection[Any]]]:
    """(source's end, target's end) of one connection."""
    with listening(transport, directory) as (listener, address):
        accepted = accepting(listener, address)
        source = dial(address, KEY, FromTarget)
        target = accepted.result(timeout=10)
    with contextlib.closing(source), contextlib.closing(target):
        yield source, target


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_message_both_ways_then_the_end(transport: str, tmp_path: Path) -> None:
    with joined(transport, tmp_path) as (source, target):
        assert source.is_local == target.is_local == (transport == "unix")
        for message in FROM_SOURCE:
            source.send(message)
        for answer in FROM_TARGET:
            target.send(answer)
        assert [target.receive() for _ in FROM_SOURCE] == FROM_SOURCE
        assert [source.receive() for _ in FROM_TARGET] == FROM_TARGET
        source.end_sending()
        assert target.receive() is None
        target.send(FROM_TARGET[0])  # one direction is over, the other goes on
        assert source.receive() == FROM_TARGET[0]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_payload_of_any_cut_follows_its_message(transport: str, tmp_path: Path) -> None:
    with joined(transport, tmp_path) as (source, target):

        @settings(deadline=None, max_examples=25)
        @given(
            sizes=st.lists(st.integers(0, 3000), max_size=40) | st.just([1] * 1300) | st.just([0, 3 << 20, 5]),
            skipped=st.booleans(),
        )
        def travels(sizes: list[int], skipped: bool) -> None:
            parts = [os.urandom(size) for size in sizes]
            sent = threading.Thread(target=source.send, args=(FROM_SOURCE[3], [memoryview(part) for part in parts]))
            sent.start()
            assert target.receive() == FROM_SOURCE[3]
            if skipped:
                target.discard(sum(sizes))
            else:
                taken = bytearray(sum(sizes))
                assert target.receive_into(memoryview(taken))
                assert taken == b"".join(parts)
            sent.join()
            source.send(FROM_SOURCE[4])
            assert target.receive() == FROM_SOURCE[4]

        travels()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "sent",
    [
        LENGTH.pack(5) + b"\xc1",
        LENGTH.pack(5)[:3],
        LENGTH.pack(MAX_CONTROL_BYTES + 1),
        LENGTH.pack(2) + b"\xc1\xc1",
        LENGTH.pack(0),
        encode_frame(Go("r1", b"nonce")),
    ],
    ids=["cut content", "cut header", "too long", "garbage", "nothing", "wrong direction"],
)
def test_what_breaks_the_rules_is_a_protocol_error(transport: str, sent: bytes, tmp_path: Path) -> None:
    with joined(transport, tmp_path) as (source, target):
        source._socket.sendall(sent)
        source.end_sending()
        with pytest.raises(ProtocolError):
            target.receive()


def test_payload_that_ends_early_is_a_protocol_error(tmp_path: Path) -> None:
    with joined("tcp", tmp_path) as (source, target):
        source.send(FROM_SOURCE[3], [memoryview(bytes(99))])
        source.end_sending()
        target.receive()
        with pytest.raises(ProtocolError, match="in the middle"):
            target.receive_into(memoryview(bytearray(100)))


def test_an_end_wakes_whoever_waits(tmp_path: Path) -> None:
    with joined("unix", tmp_path) as (source, target), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(target.receive)
        target.end()
        assert waiting.result(timeout=10) is None
        target.end()  # twice does no harm
        assert source.receive() is None
        source.close()


def test_a_peer_that_says_nothing_in_time(tmp_path: Path) -> None:
    with joined("unix", tmp_path) as (source, target):
        with pytest.raises(TimeoutError):
            target.receive(0.001)
        source.send(FROM_SOURCE[0])
        assert target.receive(10) == FROM_SOURCE[0]


def test_a_peer_that_stops_in_the_middle_of_a_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(blocking, "STALL_SECONDS", 1)
    with joined("unix", tmp_path) as (source, target):
        source._socket.sendall(LENGTH.pack(5) + b"\xc1")
        with pytest.raises(OSError):  # noqa: PT011 - the system's words
            target.receive()


def test_draining_ends_with_the_stream(tmp_path: Path) -> None:
    with joined("unix", tmp_path) as (source, target), ThreadPoolExecutor(1) as pool:
        draining = pool.submit(target.drain)
        source._socket.sendall(bytes(3 << 20))
        assert not draining.done()
        source.end_sending()
        draining.result(timeout=10)


def test_descriptors(tmp_path: Path) -> None:
    with joined("unix", tmp_path) as (source, target), open(tmp_path / "file", "w+b") as file:
        file.write(b"shared")
        file.flush()
        target.send(FROM_TARGET[0])
        target.send_descriptor(file.fileno())
        target.send(FROM_TARGET[1])
        assert source.receive() == FROM_TARGET[0]
        descriptor = source.receive_descriptor()
        assert os.pread(descriptor, 10, 0) == b"shared"
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
        assert source.receive() == FROM_TARGET[1]
        target.send(FROM_TARGET[0])
        with pytest.raises(ProtocolError, match="expected a file descriptor"):
            source.receive_descriptor()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_another_key_is_noticed_on_both_sides(transport: str, tmp_path: Path) -> None:
    with listening(transport, tmp_path) as (listener, address):
        accepted = accepting(listener, address, b"x" * 32)
        with pytest.raises(HandshakeError, match="does not hold"):
            dial(address, KEY, FromTarget)
        with pytest.raises(HandshakeError, match="turned away"):
            accepted.result(timeout=10)


@settings(deadline=None, max_examples=30)
@given(said=st.binary(max_size=150), hang_up=st.booleans())
def test_a_stranger_is_turned_away(said: bytes, hang_up: bool) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        if hang_up:
            theirs.close()
        with pytest.raises(HandshakeError):
            accept(ours, KEY, FromSource)
        assert ours.fileno() == -1  # closed


@pytest.mark.parametrize("said", [b"", handshake.MAGIC], ids=["nothing", "a little"])
def test_a_slow_handshake_has_a_deadline(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "SECONDS", 0.01)
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(said)
        with pytest.raises(HandshakeError, match="timed out"):
            accept(ours, KEY, FromSource)


def test_the_deadline_is_one_for_the_whole_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that keeps a listener waiting byte by byte does not begin its time anew with each."""
    seconds = iter(range(1000))
    monkeypatch.setattr(blocking.time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(handshake, "SECONDS", 5.0)
    waits: list[float | None] = []

    class OneByteAtATime(socket.socket):
        def settimeout(self, value: float | None) -> None:
            waits.append(value)
            super().settimeout(value)

        def recv(self, bufsize: int, flags: int = 0) -> bytes:
            return super().recv(1, flags)

    ours, theirs = socket.socketpair()
    with theirs, OneByteAtATime(fileno=ours.detach()) as slow:
        theirs.sendall(handshake.MAGIC)
        with pytest.raises(HandshakeError):
            accept(slow, KEY, FromSource)
    assert waits[:4] == [4.0, 3.0, 2.0, 1.0]
    assert max(wait for wait in waits[4:] if wait is not None) < 1


@pytest.mark.parametrize("answer", [b"", b"\x00" * handshake.REPLY_BYTES], ids=["closed", "imposter"])
def test_a_listener_that_cannot_prove_itself(answer: bytes, tmp_path: Path) -> None:
    with listening("unix", tmp_path) as (listener, address), ThreadPoolExecutor(1) as pool:

        def imposter() -> bytes:
            with listener.accept()[0] as sock:
                sock.recv(handshake.OPENING_BYTES, socket.MSG_WAITALL)
                sock.sendall(answer)
                sock.shutdown(socket.SHUT_WR)
                return sock.recv(1)

        told = pool.submit(imposter)
        with pytest.raises(HandshakeError):
            dial(address, KEY, FromTarget)
        assert told.result(timeout=10) == b""  # and it learnt no proof of ours


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        dial(f"unix:{tmp_path / 'none'}", KEY, FromTarget)
    with listening("tcp", tmp_path) as (_, address):
        pass
    with pytest.raises(ConnectionRefusedError):
        dial(address, KEY, FromTarget)


def test_unix_sockets_are_private_and_not_taken_over(tmp_path: Path) -> None:
    with listening("unix", tmp_path) as (_, address):
        assert address == f"unix:{tmp_path / 's'}"
        assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o600
        with pytest.raises(OSError, match="in use"):
            listening_socket(address)


@pytest.mark.parametrize("address", ["tcp:0.0.0.0:0", "tcp:192.0.2.1:1", "tcp:[::]:0"])
def test_only_this_machine(address: str) -> None:
    with pytest.raises(ConfigError, match="not a loopback address"):
        listening_socket(address)
    with pytest.raises(ConfigError, match="not a loopback address"):
        dial(address, KEY, FromTarget)
