"""How the bytes of a piece get from the source into the target's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from diptych.core.kv_layout import KVMemory, LayerTransfer
from diptych.transfer.pieces import Piece
from diptych.transfer.places import Places

Content = Sequence[memoryview]  # a piece's bytes, in logical order


class PageWriter(Protocol):
    """The seam where `transfer.faulty` spoils pages on purpose."""

    def write(self, transfer: LayerTransfer, piece: Piece, content: Content) -> Content:
        """Move one piece. Returns the bytes that must travel in the frame itself: all of them over TCP, none
        with mapped memory (already in place when this returns). Raises TransferError, having written
        nothing, if the piece does not lie within the target's memory."""
        ...

    def close(self) -> None:
        """No thread writes any more."""
        ...


class MappedWriter:
    """Into memory that this process can address (shared memory, or its own); `memories` in order of ranks."""

    def __init__(self, memories: Sequence[KVMemory]) -> None:
        self._memories = memories

    def write(self, transfer: LayerTransfer, piece: Piece, content: Content) -> Content:
        """Copy now."""
        layer = self._memories[transfer.target_rank].layer(transfer.layer)
        piece.target.check(len(layer))
        put(content, piece.target, layer)
        return ()

    def close(self) -> None:
        """The mapping goes with its last view."""


class InlineWriter:
    """Into the frame: the bytes follow the message, sent straight out of the source's memory if they lie
    there in long runs."""

    def write(self, transfer: LayerTransfer, piece: Piece, content: Content) -> Content:
        return content

    def close(self) -> None:
        """There is nothing to end."""


def get(places: Places, layer: memoryview, scratch: memoryview, *, few: bool = True) -> Content:
    """A stream's bytes: where they are, if that is in few runs, or gathered in `scratch`. Raises TransferError
    if they leave the layer."""
    places.check(len(layer))
    if few and places.are_long or len(places.starts) == 1:
        return places.views(layer)
    places.gather(layer, scratch[: places.nbytes])
    return (scratch[: places.nbytes],)


def put(content: Content, places: Places, layer: memoryview) -> None:
    """Copy a stream's bytes to their places."""
    if len(content) == 1 and not places.are_long:
        places.scatter(content[0], layer)
        return
    parts = iter(content)
    rest = np.frombuffer(b"", np.uint8)
    for view in places.views(layer):
        there, done = np.frombuffer(view, np.uint8), 0
        while done < len(there):
            if not len(rest):
                rest = np.frombuffer(next(parts), np.uint8)
            count = min(len(rest), len(there) - done)
            there[done : done + count] = rest[:count]  # numpy lets other threads run while it copies
            rest, done = rest[count:], done + count
