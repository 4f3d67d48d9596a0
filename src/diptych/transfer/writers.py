"""How the bytes of a plan reach the target (implementations of core.ports.PageWriter)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diptych.core.errors import TransferError
from diptych.core.kv_layout import KVMemory, LayerTransfer
from diptych.core.ports import PageSource


class MappedWriter:
    """Into memory that this process can address (shared memory, or its own): one copy, range by range."""

    def __init__(self, target: KVMemory) -> None:
        self._target = target

    def write(self, transfer: LayerTransfer, source: PageSource) -> Sequence[memoryview]:
        """Copy now."""
        theirs = np.frombuffer(self._target.layer(transfer.layer), dtype=np.uint8)
        ours = np.frombuffer(source.layer(transfer.layer), dtype=np.uint8)
        _check(transfer, len(ours), len(theirs))
        for span in transfer.ranges:  # numpy lets other threads run while it copies
            read, written, length = span.source_offset, span.target_offset, span.length
            theirs[written : written + length] = ours[read : read + length]
        return ()


class InlineWriter:
    """Into the frame: the bytes follow the message, sent straight out of the source's memory."""

    def write(self, transfer: LayerTransfer, source: PageSource) -> Sequence[memoryview]:
        """The buffers to send, in order of the ranges (which are in order of the logical blocks)."""
        ours = source.layer(transfer.layer)
        _check(transfer, len(ours))
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
