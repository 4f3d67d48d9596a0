"""A writer that spoils pages on purpose, so that tests can see every kind of damage being noticed."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

from diptych.core.kv_layout import LayerTransfer
from diptych.transfer.pieces import Piece
from diptych.transfer.writers import PageWriter, Payload


class Fault(StrEnum):
    FLIP = "flip"  # one bit of one unit is inverted
    DROP = "drop"  # nothing of the piece arrives
    TRUNCATE = "truncate"  # only its first half arrives
    ZERO = "zero"  # one unit is empty
    FOREIGN = "foreign"  # one unit is another one of the piece (takes two units to show)
    REORDER = "reorder"  # units arrive in each other's places (takes two units to show)


class FaultyWriter:
    """Wraps a writer; `plan` says which of its writes (counted from 0) suffer which fault. Which unit or
    bit that is follows from `seed`. `spoiled` counts the faults that made a difference."""

    def __init__(self, writer: PageWriter, plan: Mapping[int, Fault], seed: int = 0) -> None:
        self._writer = writer
        self._plan = plan
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._writes = 0
        self.spoiled = 0

    def needs_staging(self, piece: Piece) -> bool:
        return self._writer.needs_staging(piece)

    def write(
        self, transfer: LayerTransfer, piece: Piece, layer: memoryview, staged: memoryview | None = None
    ) -> Payload:
        """As the wrapped writer, or worse."""
        with self._lock:
            fault = self._plan.get(self._writes)
            self._writes += 1
            if fault is None:
                return self._writer.write(transfer, piece, layer, staged)
            right = b"".join(piece.source.views(layer))
            wrong = self._spoil(right, piece.unit_ends, fault)
            self.spoiled += wrong != right
        if not wrong:
            return ()
        if len(wrong) < len(right):
            piece = replace(piece, target=piece.target.part(0, len(wrong)))
        return self._writer.write(transfer, piece, layer, memoryview(wrong))

    def close(self) -> None:
        self._writer.close()

    def _spoil(self, content: bytes, ends: Sequence[int], fault: Fault) -> bytes:
        units = [content[start:end] for start, end in zip((0, *ends), ends, strict=False)]
        victim = self._random.randrange(len(units))
        match fault:
            case Fault.FLIP:
                unit = bytearray(units[victim])
                unit[self._random.randrange(len(unit))] ^= 1 << self._random.randrange(8)
                units[victim] = bytes(unit)
            case Fault.ZERO:
                units[victim] = bytes(len(units[victim]))
            case Fault.FOREIGN:
                other = units[(victim + 1) % len(units)]
                units[victim] = other[: len(units[victim])].ljust(len(units[victim]), b"\0")
            case Fault.REORDER:
                units.reverse()
            case Fault.DROP:
                return b""
            case Fault.TRUNCATE:
                return content[: len(content) // 2]
        return b"".join(units)
