"""How the bytes of a plan reach the target (implementations of core.ports.PageWriter)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diptych.core.errors import TransferError
from diptych.core.kv_layout import ByteRange, KVMemory, LayerTransfer
from diptych.core.ports import PageSource


class MappedWriter:
    """Into memory that this process can address (shared memory, or its own): one copy, range by range."""

    def __init__(self, target: KVMemory) -> None:
        self._target = target

    def write(self, transfer: LayerTransfer, source: PageSource) -> Sequence[memoryview]:
        """Copy now. Raises TransferError, having written nothing, if a range leaves the layer."""
        theirs, ours = self._target.layer(transfer.layer), source.layer(transfer.layer)
        for span in transfer.ranges:
            _check(span.source_offset, span, ours)
            _check(span.target_offset, span, theirs)
        target_bytes = np.frombuffer(theirs, dtype=np.uint8)
        source_bytes = np.frombuffer(ours, dtype=np.uint8)
        for span in transfer.ranges:  # numpy lets other threads run while it copies
            page = source_bytes[span.source_offset : span.source_offset + span.length]
            np.copyto(target_bytes[span.target_offset : span.target_offset + span.length], page)
        return ()


class InlineWriter:
    """Into the frame: the bytes follow the message, sent straight out of the source's memory."""

    def write(self, transfer: LayerTransfer, source: PageSource) -> Sequence[memoryview]:
        """The buffers to send, in order of the ranges (which are in order of the logical blocks)."""
        ours = source.layer(transfer.layer)
        for span in transfer.ranges:
            _check(span.source_offset, span, ours)
        return [ours[span.source_offset : span.source_offset + span.length] for span in transfer.ranges]


def _check(offset: int, span: ByteRange, layer: memoryview) -> None:
    if offset < 0 or span.length < 0 or offset + span.length > len(layer):
        raise TransferError(f"a range of {span.length} bytes at {offset} leaves a layer of {len(layer)} bytes")
