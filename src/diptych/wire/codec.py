"""Frames: a length in four bytes (big-endian), then that many bytes: XXH3-64 of a message in msgpack, and the message.

The length is checked against a hard maximum before anything is allocated, and the content is decoded
into the expected types only; whatever does not fit, or was damaged on its way, is a ProtocolError.
(A flipped bit in a token would still be a token. Like the digests of pages the checksum is not a MAC.)
"""

from __future__ import annotations

import struct
from typing import Any, Generic, TypeVar

import msgspec
import xxhash

from diptych.core.errors import ProtocolError

T = TypeVar("T")

LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 16 << 20
CHECKSUM_BYTES = 8

_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: object, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """One message as a frame. Raises ProtocolError if it is too large to be taken in by anybody."""
    content = seal(_encoder.encode(message))
    if len(content) > max_bytes:
        raise ProtocolError(f"a {type(message).__name__} of {len(content)} bytes exceeds the limit of {max_bytes}")
    return LENGTH.pack(len(content)) + content


def seal(encoded: bytes) -> bytes:
    """The content of a frame, for a message in msgpack."""
    return xxhash.xxh3_64_digest(encoded) + encoded


def frame_length(header: bytes, max_bytes: int = MAX_FRAME_BYTES) -> int:
    """The length that a header announces. Raises ProtocolError above the maximum."""
    (length,) = LENGTH.unpack(header)
    if length > max_bytes:
        raise ProtocolError(f"a frame of {length} bytes was announced, the limit is {max_bytes}")
    return int(length)


class Decoder(Generic[T]):
    """Decodes frame contents into one type (usually a union of messages)."""

    def __init__(self, expected: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(expected)

    def decode(self, content: bytes | memoryview) -> T:
        """Raises ProtocolError for anything that is not, undamaged, exactly the expected type."""
        checksum, encoded = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
        if xxhash.xxh3_64_digest(encoded) != checksum:
            raise ProtocolError("a frame was damaged on its way")
        try:
            return self._decoder.decode(encoded)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise ProtocolError(f"a frame does not parse: {error}") from error
