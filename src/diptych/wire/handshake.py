"""Mutual proof that both ends hold the fleet's key, before anything else is parsed.

    connector                                   listener
        MAGIC, nonce a (32 bytes)          →
                                           ←    nonce b (32), proof(key, "listener", a, b) (32)
        proof(key, "connector", a, b) (32) →
                                           ←    one byte: 1

The proofs are HMAC-SHA256 and name the side that makes them, so neither can be sent back to its maker.
Inside TLS (`wire.tls`) they also cover the listener's certificate, so they are worth nothing on any other
connection. All messages have fixed sizes. Without TLS what follows is not encrypted: such channels stay on
one machine (loopback, Unix sockets).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from diptych.core.errors import HandshakeError

MAGIC = b"diptych1"
NONCE_BYTES = 32
PROOF_BYTES = 32
OPENING_BYTES = len(MAGIC) + NONCE_BYTES
REPLY_BYTES = NONCE_BYTES + PROOF_BYTES
CONFIRMED = b"\x01"
SECONDS = 5.0  # for the whole handshake


class ConnectorSide:
    """The side that opens the connection: send `opening`, then `answer(reply)`.

    `binding` names the TLS connection around the handshake; empty without one."""

    def __init__(self, key: bytes, binding: bytes = b"") -> None:
        self._key = key
        self._binding = binding
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self.opening = MAGIC + self._nonce

    def answer(self, reply: bytes) -> bytes:
        """Check the listener's proof and give ours. Raises HandshakeError."""
        if reply.startswith(b"HTTP/"):
            raise HandshakeError("the listener is a web server; workers join at the address of --listen")
        theirs, proof = reply[:NONCE_BYTES], reply[NONCE_BYTES:]
        nonces = self._nonce + theirs
        if not hmac.compare_digest(proof, _proof(self._key, b"listener", nonces, self._binding)):
            raise HandshakeError("the listener does not hold this fleet's key")
        return _proof(self._key, b"connector", nonces, self._binding)


class ListenerSide:
    """The side that was called: send `reply(opening)`, then `check(answer)`. `binding` as on the other side."""

    def __init__(self, key: bytes, binding: bytes = b"") -> None:
        self._key = key
        self._binding = binding
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._theirs = b""

    def reply(self, opening: bytes) -> bytes:
        """Raises HandshakeError if the caller speaks something else."""
        if opening[: len(MAGIC)] != MAGIC:
            raise HandshakeError("the caller does not speak this protocol")
        self._theirs = opening[len(MAGIC) :]
        return self._nonce + _proof(self._key, b"listener", self._theirs + self._nonce, self._binding)

    def check(self, answer: bytes) -> None:
        """Raises HandshakeError unless the caller holds the key."""
        if not hmac.compare_digest(answer, _proof(self._key, b"connector", self._theirs + self._nonce, self._binding)):
            raise HandshakeError("the caller does not hold this fleet's key")


def _proof(key: bytes, side: bytes, nonces: bytes, binding: bytes) -> bytes:
    return hmac.digest(key, MAGIC + side + nonces + binding, hashlib.sha256)
