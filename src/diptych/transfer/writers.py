"""How the bytes of a piece get from the source into the target's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from diptych.core.kv_layout import KVMemory, LayerTransfer
from diptych.transfer.pieces import Piece

Payload = Sequence[memoryview]


class PageWriter(Protocol):
    """The seam where `transfer.faulty` spoils pages on purpose."""

    def needs_staging(self, piece: Piece) -> bool:
        """Whether a piece has to be gathered first, since its bytes are too scattered to go from place to place."""
        ...

    def write(
        self, transfer: LayerTransfer, piece: Piece, layer: memoryview, staged: memoryview | None = None
    ) -> Payload:
        """Move one piece: out of the source's `layer`, or what was `staged` of it. Returns the bytes that must travel
        in the frame itself: all of them over TCP, none with mapped memory (already in place when this
        returns). Raises TransferError, having written nothing, if the piece does not lie within the
        target's memory."""
        ...

    def close(self) -> None:
        """No thread writes any more."""
        ...


class MappedWriter:
    """Into memory that this process can address (shared memory, or its own); `memories` in order of ranks."""

    def __init__(self, memories: Sequence[KVMemory]) -> None:
        self._memories = memories

    def needs_staging(self, piece: Piece) -> bool:
        one_sided = piece.source.is_one or (piece.target.is_one and piece.spans is not None)
        return piece.copies is None and not one_sided

    def write(
        self, transfer: LayerTransfer, piece: Piece, layer: memoryview, staged: memoryview | None = None
    ) -> Payload:
        """Copy now."""
        there = self._memories[transfer.target_rank].layer(transfer.layer)
        piece.target.check(len(there))
        if staged is not None:
            piece.target.scatter(staged, there)
        elif piece.copies is not None:
            source, target = np.frombuffer(layer, np.uint8), np.frombuffer(there, np.uint8)
            for copy in piece.copies:
                copy.carry_out(source, target)
        elif piece.source.is_one:
            piece.target.scatter(piece.source.views(layer)[0], there)
        else:
            piece.source.gather(layer, piece.target.views(there)[0])
        return ()

    def close(self) -> None:
        """Let go of the memory: as long as anybody maps it, a target that has died still takes its room."""
        self._memories = ()


class InlineWriter:
    """Into the frame: the bytes follow the message, sent straight out of the source's memory if they lie
    there in long runs."""

    def needs_staging(self, piece: Piece) -> bool:
        return not piece.source.are_long

    def write(
        self, transfer: LayerTransfer, piece: Piece, layer: memoryview, staged: memoryview | None = None
    ) -> Payload:
        """What to send, in logical order."""
        return piece.source.views(layer) if staged is None else (staged,)

    def close(self) -> None:
        """There is nothing to end."""
