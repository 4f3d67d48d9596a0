"""A writer that spoils pages on purpose, so that tests can see every kind of damage being noticed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

from diptych.core.kv_layout import ByteRange, LayerTransfer
from diptych.core.ports import PageSource, PageWriter
from diptych.transfer.arrays import KVPages


class Fault(StrEnum):
    FLIP = "flip"  # one bit of one page is inverted
    DROP = "drop"  # the last range does not arrive
    TRUNCATE = "truncate"  # only half of the last range arrives
    ZERO = "zero"  # one page is empty
    FOREIGN = "foreign"  # one page is that of another block (takes two blocks to show)
    REORDER = "reorder"  # pages arrive in each other's places (takes two pages to show)


class FaultyWriter:
    """Wraps a writer; `plan` says which of its writes (counted from 0) suffer which fault. Which page or
    bit that is follows from `seed`."""

    def __init__(self, writer: PageWriter, plan: Mapping[int, Fault], seed: int = 0) -> None:
        self._writer = writer
        self._plan = plan
        self._random = random.Random(seed)
        self._writes = 0

    def write(self, transfer: LayerTransfer, source: PageSource) -> Sequence[memoryview]:
        """As the wrapped writer, or worse."""
        fault = self._plan.get(self._writes)
        self._writes += 1
        *others, last = transfer.ranges
        pages = _pages(transfer.ranges, source.layout.block_bytes)
        victim = self._random.randrange(len(pages))
        match fault:
            case Fault.FLIP | Fault.ZERO:
                source = self._spoiled(source, transfer.layer, pages[victim], fault)
            case Fault.DROP:
                transfer = replace(transfer, ranges=tuple(others))
            case Fault.TRUNCATE:
                transfer = replace(transfer, ranges=(*others, replace(last, length=last.length // 2)))
            case Fault.FOREIGN:
                pages[victim] = _of_another_block(pages[victim], source)
                transfer = replace(transfer, ranges=tuple(pages))
            case Fault.REORDER:
                places = zip(pages, reversed(pages), strict=True)
                swapped = tuple(replace(page, source_offset=other.source_offset) for page, other in places)
                transfer = replace(transfer, ranges=swapped)
        return self._writer.write(transfer, source)

    def _spoiled(self, source: PageSource, layer: int, page: ByteRange, fault: Fault) -> KVPages:
        """A copy of the source's layer with one page wrong."""
        copy = memoryview(bytearray(source.layer(layer)))
        content = copy[page.source_offset : page.source_offset + page.length]
        if fault is Fault.ZERO:
            content[:] = bytes(page.length)
        else:
            content[self._random.randrange(page.length)] ^= 1 << self._random.randrange(8)
        return KVPages(source.layout, source.num_blocks, {layer: copy})


def _pages(ranges: Sequence[ByteRange], block_bytes: int) -> list[ByteRange]:
    """The ranges, block by block."""
    return [
        ByteRange(span.source_offset + offset, span.target_offset + offset, block_bytes)
        for span in ranges
        for offset in range(0, span.length, block_bytes)
    ]


def _of_another_block(page: ByteRange, source: PageSource) -> ByteRange:
    size = source.layout.block_bytes
    return replace(page, source_offset=(page.source_offset + size) % (source.num_blocks * size))
