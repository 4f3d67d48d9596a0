"""TLS without a public-key infrastructure, for channels between hosts.

A listener makes a key and a self-signed certificate when it opens, and forgets both when it closes. Nobody
checks who signed the certificate; instead the handshake that runs inside (`wire.handshake`) proves the
fleet's key over the hash of the certificate (the channel binding `tls-server-end-point` of RFC 5929). A man
in the middle can only show a certificate of his own, and so cannot pass either side's proof on to the other.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from diptych.wire.address import TcpAddress, parse_address

T = TypeVar("T")

NAME = "diptych"
LIFETIME = datetime.timedelta(days=3650)  # nobody checks it; a listener does not live that long
SHUTDOWN_SECONDS = 1.0  # for a peer's goodbye when an asyncio channel is closed
_CHUNK_BYTES = 256 << 10  # handed to OpenSSL at once, while the other direction has to wait


@dataclass(frozen=True, slots=True)
class ListenerTls:
    """What a listener shows to its callers; `binding` is the hash of its certificate."""

    context: ssl.SSLContext
    binding: bytes


def listener_tls(address: str) -> ListenerTls | None:
    """A fresh certificate for a listener at a `tls:` address; None for any other."""
    where = parse_address(address)
    if not isinstance(where, TcpAddress) or not where.tls:
        return None
    certificate, key = _self_signed()
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # sessions are not resumed: every connection proves itself anew
    descriptor = os.memfd_create("diptych-certificate", os.MFD_CLOEXEC)  # `ssl` reads files only; this one has no name
    with os.fdopen(descriptor, "wb") as file:
        file.write(ssl.DER_cert_to_PEM_cert(certificate).encode() + key)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    return ListenerTls(context, binding_of(certificate))


@functools.cache
def connector_context() -> ssl.SSLContext:
    """For callers: whose certificate it is comes out in the handshake inside."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def binding_of(certificate: bytes | None) -> bytes:
    """The channel binding of a certificate in DER."""
    return hashlib.sha256(certificate or b"").digest()


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # frames have lengths, so a cut stream is noticed there
    return context


def _self_signed() -> tuple[bytes, bytes]:
    """A certificate (DER) and its private key (PEM)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - LIFETIME)  # clocks of two hosts may differ
        .not_valid_after(now + LIFETIME)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.DER), key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class TlsStream:
    """A TLS socket that one thread may read while another one writes.

    Two threads must not use an OpenSSL connection at the same time. So each call into it holds a lock and
    never blocks; waiting, for `stall_seconds` at most (then TimeoutError), happens outside, in poll(2).
    """

    def __init__(self, sock: ssl.SSLSocket, stall_seconds: float) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._stall_seconds = stall_seconds
        self._lock = threading.Lock()

    def sendmsg(self, buffers: Sequence[memoryview]) -> int:
        """Send some of the first buffer; returns how many bytes."""
        chunk = buffers[0][:_CHUNK_BYTES]
        return self._patiently(lambda: self._socket.send(chunk)) if chunk else 0

    def sendall(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self.sendmsg([rest]) :]

    def recv_into(self, buffer: memoryview | bytearray) -> int:
        """As of a socket: 0 at the end of the stream."""
        return self._patiently(lambda: self._socket.recv_into(buffer))

    def _patiently(self, call: Callable[[], T]) -> T:
        while True:
            with self._lock:
                try:
                    return call()
                except ssl.SSLWantReadError:
                    events = select.POLLIN
                except ssl.SSLWantWriteError:
                    events = select.POLLOUT
            waiting = select.poll()
            waiting.register(self._socket, events)
            if not waiting.poll(self._stall_seconds * 1000):
                raise TimeoutError("the peer has stalled")

    def pending(self) -> int:
        """Bytes that have been decrypted and not been read: the socket does not become readable for them."""
        with self._lock:
            return self._socket.pending()

    def shutdown(self, how: int) -> None:
        """End the stream beneath. (SSLSocket's own would go on in plain text.)"""
        socket.socket.shutdown(self._socket, how)

    @property
    def family(self) -> int:
        return self._socket.family

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()
