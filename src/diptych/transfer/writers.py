"""How the bytes of a plan reach the target (implementations of core.ports.PageWriter)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diptych.core.errors import TransferError
from diptych.core.kv_layout import ByteRange, KVMemory, LayerTransfer
from diptych.core.ports import OnRead, PageSource

Ranges = tuple[ByteRange, ...]

CACHED_BYTES = 256 << 10  # what was just copied and is still in a core's cache


class MappedWriter:
    """Into memory that this process can address (shared memory, or its own): one copy, range by range."""

    def __init__(self, target: KVMemory) -> None:
        self._target = target

    def write(self, transfer: LayerTransfer, source: PageSource, on_read: OnRead) -> Sequence[memoryview]:
        """Copy now."""
        theirs = np.frombuffer(self._target.layer(transfer.layer), dtype=np.uint8)
        ours = np.frombuffer(source.layer(transfer.layer), dtype=np.uint8)
        _check(transfer, len(ours), len(theirs))
        block_bytes = source.layout.block_bytes
        most = max(CACHED_BYTES // block_bytes, 1) * block_bytes
        for span in transfer.ranges:
            read, written = span.source_offset, span.target_offset
            end = read + span.length
            while read < end:
                length = min(most, end - read)
                theirs[written : written + length] = ours[read : read + length]  # other threads may run meanwhile
                on_read(read, length)
                read += length
                written += length
        return ()


class InlineWriter:
    """Into the frame: the bytes follow the message, sent straight out of the source's memory."""

    def write(self, transfer: LayerTransfer, source: PageSource, on_read: OnRead) -> Sequence[memoryview]:
        """The buffers to send, in order of the ranges (which are in order of the logical blocks)."""
        ours = source.layer(transfer.layer)
        _check(transfer, len(ours))
        for span in transfer.ranges:
            on_read(span.source_offset, span.length)
        return [ours[span.source_offset : span.source_offset + span.length] for span in transfer.ranges]


def _check(transfer: LayerTransfer, source_bytes: int, target_bytes: int | None = None) -> None:
    """Raises TransferError unless all ranges lie within the layers. (The target of an inline range is not
    ours to check.)"""
    for span in transfer.ranges:
        outside = span.source_offset < 0 or span.length < 0 or span.source_offset + span.length > source_bytes
        if target_bytes is not None:
            outside = outside or span.target_offset < 0 or span.target_offset + span.length > target_bytes
        if outside:
            raise TransferError(f"{span} leaves a layer of {source_bytes} bytes, or one of {target_bytes}")


def cut_ranges(ranges: Ranges, block_bytes: int, nbytes: int) -> list[Ranges]:
    """The same ranges, in pieces of at most `nbytes` (but at least a block) and of whole blocks."""
    most = max(nbytes // block_bytes, 1) * block_bytes
    pieces: list[Ranges] = []
    piece: list[ByteRange] = []
    room = most
    for span in ranges:
        done = 0
        while done < span.length:
            length = min(room, span.length - done)
            piece.append(ByteRange(span.source_offset + done, span.target_offset + done, length))
            done += length
            room -= length
            if room == 0:
                pieces.append(tuple(piece))
                piece, room = [], most
    return [*pieces, tuple(piece)] if piece else pieces
