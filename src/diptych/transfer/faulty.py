"""A writer that spoils pages on purpose, so that tests can see every kind of damage being noticed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

from diptych.core.kv_layout import ByteRange, KVMemory, LayerTransfer
from diptych.core.ports import PageWriter


class Fault(StrEnum):
    FLIP = "flip"  # one bit of one page is inverted
    DROP = "drop"  # the last range does not arrive
    TRUNCATE = "truncate"  # only half of the last range arrives
    REORDER = "reorder"  # pages arrive in each other's places (takes two pages to show)


class FaultyWriter:
    """Wraps a writer; `plan` says which of its writes (counted from 0) suffer which fault. Where a bit
    flips follows from `seed`."""

    def __init__(self, writer: PageWriter, plan: Mapping[int, Fault], seed: int = 0) -> None:
        self._writer = writer
        self._plan = plan
        self._random = random.Random(seed)
        self._writes = 0

    def write(self, transfer: LayerTransfer, source: KVMemory) -> Sequence[memoryview]:
        """As the wrapped writer, or worse."""
        fault = self._plan.get(self._writes)
        self._writes += 1
        *others, last = transfer.ranges
        match fault:
            case Fault.FLIP:
                source = self._with_flipped_bit(source, transfer)
            case Fault.DROP:
                transfer = replace(transfer, ranges=tuple(others))
            case Fault.TRUNCATE:
                transfer = replace(transfer, ranges=(*others, replace(last, length=last.length // 2)))
            case Fault.REORDER:
                transfer = replace(transfer, ranges=_reordered(transfer.ranges, source.layout.block_bytes))
        return self._writer.write(transfer, source)

    def _with_flipped_bit(self, source: KVMemory, transfer: LayerTransfer) -> KVMemory:
        """A copy of the source's memory with one wrong bit in what is about to be sent."""
        spoiled = KVMemory(source.layout, source.num_blocks, memoryview(bytearray(source.buffer)))
        span = self._random.choice(transfer.ranges)
        offset = span.source_offset + self._random.randrange(span.length)
        spoiled.layer(transfer.layer)[offset] ^= 1 << self._random.randrange(8)
        return spoiled


def _reordered(ranges: Sequence[ByteRange], block_bytes: int) -> tuple[ByteRange, ...]:
    """The same pages, last to first, into places first to last."""
    pages = [
        ByteRange(span.source_offset + offset, span.target_offset + offset, block_bytes)
        for span in ranges
        for offset in range(0, span.length, block_bytes)
    ]
    return tuple(
        replace(page, source_offset=other.source_offset) for page, other in zip(pages, reversed(pages), strict=True)
    )
