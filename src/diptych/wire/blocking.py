"""The same frames and handshake over blocking sockets, for threads that move KV pages.

A frame may be followed by raw payload, sent straight out of memory (`sendmsg`) and received straight
into it (`recv_into`): no copy in between, other than TLS's own.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import stat
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from diptych.core.errors import HandshakeError, ProtocolError
from diptych.wire import handshake
from diptych.wire.address import TcpAddress, UnixAddress, parse_address
from diptych.wire.codec import LENGTH, Decoder, encode_frame, frame_length
from diptych.wire.tls import ListenerTls, TlsStream, binding_of, connector_context

T = TypeVar("T")

MAX_CONTROL_BYTES = 1 << 20  # data-plane frames are small; pages follow as payload
STALL_SECONDS = 30  # a peer that takes nothing, or stops in the middle of a message, for this long is lost
_MAX_BUFFERS = 512  # per sendmsg, below every system's IOV_MAX
_DISCARD_BYTES = 1 << 20


class BlockingConnection(Generic[T]):
    """One end of a data connection: sends anything, receives messages of type T.

    One thread may send while another receives. Any OSError or ProtocolError means the connection is over.
    """

    def __init__(self, sock: socket.socket, expects: Any, max_bytes: int = MAX_CONTROL_BYTES) -> None:
        self._decoder: Decoder[T] = Decoder(expects)
        self._max_bytes = max_bytes
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)
        self._socket = TlsStream(sock, STALL_SECONDS) if isinstance(sock, ssl.SSLSocket) else _blocking(sock)
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)

    def send(self, message: object, payload: Sequence[memoryview] = ()) -> None:
        """Send a message, and after it the payload buffers. Blocks while the peer is slow."""
        frame = memoryview(encode_frame(message, self._max_bytes))
        for start in range(0, max(len(payload), 1), _MAX_BUFFERS):
            part = payload[start : start + _MAX_BUFFERS]
            self._send_all([frame, *part] if start == 0 else list(part))

    @property
    def is_free(self) -> bool:
        """Whether a small message could be sent now without waiting for the peer."""
        return bool(self._writable.poll(0))

    def _send_all(self, buffers: list[memoryview]) -> None:
        while buffers:
            _skip(buffers, self._socket.sendmsg(buffers))

    def receive(self, seconds: float | None = None) -> T | None:
        """The next message; None when the peer has closed its end. Waits for as long as it takes, or
        `seconds` (then TimeoutError); a message that has begun has to go on coming."""
        if not self._wait(seconds):
            raise TimeoutError(f"the peer has said nothing for {seconds} s")
        header = bytearray(LENGTH.size)
        if not self.receive_into(memoryview(header), may_end=True):
            return None
        content = bytearray(frame_length(bytes(header), self._max_bytes))
        self.receive_into(memoryview(content))
        return self._decoder.decode(memoryview(content))

    def _wait(self, seconds: float | None = None) -> bool:
        """Wait until there is something to read. False after `seconds`."""
        if isinstance(self._socket, TlsStream) and self._socket.pending():
            return True
        return bool(self._readable.poll(None if seconds is None else seconds * 1000))

    def receive_into(self, buffer: memoryview, *, may_end: bool = False) -> bool:
        """Fill `buffer` with what comes next. False if `may_end` and the stream ends before its first
        byte; an end anywhere else is a ProtocolError."""
        done = 0
        while done < len(buffer):
            received = self._socket.recv_into(buffer[done:])
            if received == 0:
                if may_end and done == 0:
                    return False
                raise ProtocolError("the connection ended in the middle of a message")
            done += received
        return True

    def receive_scattered(self, buffers: Sequence[memoryview]) -> None:
        """Fill all buffers, in order, with what comes next."""
        if isinstance(self._socket, TlsStream):
            for buffer in buffers:
                self.receive_into(buffer)
            return
        for start in range(0, len(buffers), _MAX_BUFFERS):
            part = list(buffers[start : start + _MAX_BUFFERS])
            while part:
                received = self._socket.recvmsg_into(part)[0]
                if received == 0:
                    raise ProtocolError("the connection ended in the middle of a message")
                _skip(part, received)

    def drain(self) -> None:
        """Skip everything until the peer closes its end, for as long as that takes."""
        scratch = bytearray(_DISCARD_BYTES)
        while self._wait() and self._socket.recv_into(scratch):
            pass

    def discard(self, nbytes: int) -> None:
        """Skip payload that nobody wants."""
        scratch = memoryview(bytearray(min(nbytes, _DISCARD_BYTES)))
        while nbytes > 0:
            self.receive_into(scratch[: min(nbytes, _DISCARD_BYTES)])
            nbytes -= len(scratch)

    def send_descriptor(self, descriptor: int) -> None:
        """Hand a file descriptor over (Unix sockets only)."""
        socket.send_fds(self._unix_socket, [b"\x00"], [descriptor])

    def receive_descriptor(self) -> int:
        """Take a file descriptor, which the caller owns from now on. Raises ProtocolError if none came."""
        _, descriptors, _, _ = socket.recv_fds(self._unix_socket, 1, 1)
        if len(descriptors) != 1:
            raise ProtocolError("expected a file descriptor")
        os.set_inheritable(descriptors[0], False)  # recv_fds takes flags but does not pass MSG_CMSG_CLOEXEC on
        return int(descriptors[0])

    @property
    def is_local(self) -> bool:
        """Whether descriptors can be passed (a Unix socket)."""
        return self._socket.family == socket.AF_UNIX

    @property
    def _unix_socket(self) -> socket.socket:
        if isinstance(self._socket, TlsStream):
            raise ProtocolError("descriptors do not leave this machine")
        return self._socket

    def end_sending(self) -> None:
        """Tell the peer that nothing more will come; receiving goes on."""
        self._socket.shutdown(socket.SHUT_WR)

    def end(self) -> None:
        """Wake up whoever is blocked on this connection; it is over in both directions."""
        with contextlib.suppress(OSError):  # the peer may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def _keep_alive(sock: socket.socket) -> None:
    """Have the kernel notice, within STALL_SECONDS, that the peer's host is gone, even if nothing is to be sent."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _skip(buffers: list[memoryview], nbytes: int) -> None:
    """So many bytes of the buffers, from the first one on, are done with."""
    done = 0
    while done < len(buffers) and nbytes >= len(buffers[done]):
        nbytes -= len(buffers[done])
        done += 1
    del buffers[:done]
    if nbytes:
        buffers[0] = buffers[0][nbytes:]


def _blocking(sock: socket.socket) -> socket.socket:
    """The socket, with waits that end when the peer has stalled."""
    sock.setblocking(True)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STALL_SECONDS, 0))
    return sock


def dial(address: str, key: bytes, expects: Any) -> BlockingConnection[Any]:
    """Connect and prove. Raises HandshakeError, or OSError if nobody listens."""
    where = parse_address(address)
    sock = _connect(where)
    deadline = time.monotonic() + handshake.SECONDS
    binding = b""
    try:
        if isinstance(where, TcpAddress) and where.tls:
            sock = secured = connector_context().wrap_socket(sock)
            binding = binding_of(secured.getpeercert(binary_form=True))
        side = handshake.ConnectorSide(key, binding)
        sock.sendall(side.opening)
        sock.sendall(side.answer(_exactly(sock, handshake.REPLY_BYTES, deadline)))
        if _exactly(sock, 1, deadline) != handshake.CONFIRMED:
            raise HandshakeError("it does not accept this fleet key")
    except (OSError, HandshakeError) as error:
        sock.close()
        raise HandshakeError(f"no handshake with {address}: {error}") from error
    return BlockingConnection(sock, expects)


def _connect(where: TcpAddress | UnixAddress) -> socket.socket:
    if isinstance(where, TcpAddress):
        return socket.create_connection((where.host, where.port), handshake.SECONDS)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(handshake.SECONDS)
        sock.connect(where.path)
    except OSError:
        sock.close()
        raise
    return sock


def accept(sock: socket.socket, key: bytes, expects: Any, tls: ListenerTls | None = None) -> BlockingConnection[Any]:
    """Prove to a caller that has just connected. Raises HandshakeError; the socket is closed then."""
    deadline = time.monotonic() + handshake.SECONDS
    side = handshake.ListenerSide(key, tls.binding if tls else b"")
    try:
        if tls is not None:
            sock.settimeout(handshake.SECONDS)
            sock = tls.context.wrap_socket(sock, server_side=True)
        sock.sendall(side.reply(_exactly(sock, handshake.OPENING_BYTES, deadline)))
        side.check(_exactly(sock, handshake.PROOF_BYTES, deadline))
        sock.sendall(handshake.CONFIRMED)
    except (OSError, HandshakeError) as error:
        sock.close()
        raise HandshakeError(f"a caller was turned away: {error}") from error
    return BlockingConnection(sock, expects)


def listening_socket(address: str) -> tuple[socket.socket, str]:
    """A listening socket and its real address (port 0 takes a free one). Unix sockets get mode 0600."""
    where = parse_address(address)
    if isinstance(where, TcpAddress):
        family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
        sock = socket.create_server((where.host, where.port), family=family)
        return sock, str(replace(where, port=sock.getsockname()[1]))
    sock = socket.socket(socket.AF_UNIX)
    try:
        _remove_stale(where.path)
        sock.bind(where.path)
        os.chmod(where.path, 0o600)
        sock.listen()
    except OSError:
        sock.close()
        raise
    return sock, address


def end_listening(sock: socket.socket) -> None:
    """Take no more callers and wake whoever waits for them. The name of a Unix socket goes before it does, so that it
    cannot be a successor's."""
    if sock.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):  # somebody has cleaned up already
            os.unlink(sock.getsockname())
    sock.shutdown(socket.SHUT_RDWR)


def _remove_stale(path: str) -> None:
    """Remove the name of a Unix socket that nobody listens at any more: that of somebody who was killed."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
            with socket.socket(socket.AF_UNIX) as caller, contextlib.suppress(BlockingIOError):  # there is, but busy
                caller.setblocking(False)
                try:
                    caller.connect(path)
                except ConnectionRefusedError:
                    os.unlink(path)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a stream within this process."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def _exactly(sock: socket.socket, nbytes: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        part = sock.recv(nbytes - len(data))
        if not part:
            raise HandshakeError("the other end closed the connection during the handshake")
        data += part
    return bytes(data)
