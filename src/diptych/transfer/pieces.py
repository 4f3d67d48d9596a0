"""In what portions a layer's pages are moved.

A frame is a message and the pages that it announces: large, since it costs both sides a few system calls,
but not the whole layer, so that the target can verify one while the next is being written.

A piece is what is copied in one go, and then hashed while it is still in the core's cache, which takes about
half the time of hashing it before or later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diptych.core.blocks import BlockId
from diptych.core.kv_layout import ByteRange

FRAME_BYTES = 4 << 20
PIECE_BYTES = 1 << 20

Ranges = tuple[ByteRange, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some ranges, and the source's blocks that they consist of, in the same order."""

    ranges: Ranges
    blocks: tuple[BlockId, ...]


def frames_of(ranges: Ranges, block_bytes: int) -> list[list[Piece]]:
    """The same ranges, frame by frame, and in each piece by piece. They consist of whole blocks."""
    return [
        [Piece(part, tuple(_blocks(part, block_bytes))) for part in cut(frame, block_bytes, PIECE_BYTES)]
        for frame in cut(ranges, block_bytes, FRAME_BYTES)
    ]


def cut(ranges: Ranges, block_bytes: int, nbytes: int) -> Iterator[Ranges]:
    """The same ranges, in parts of whole blocks and at most `nbytes` (but at least one block)."""
    most = max(nbytes // block_bytes, 1) * block_bytes
    part: list[ByteRange] = []
    room = most
    for span in ranges:
        done = 0
        while done < span.length:
            length = min(room, span.length - done)
            part.append(ByteRange(span.source_offset + done, span.target_offset + done, length))
            done += length
            room -= length
            if room == 0:
                yield tuple(part)
                part, room = [], most
    if part:
        yield tuple(part)


def _blocks(ranges: Ranges, block_bytes: int) -> Iterator[BlockId]:
    for span in ranges:
        yield from range(span.source_offset // block_bytes, (span.source_offset + span.length) // block_bytes)
