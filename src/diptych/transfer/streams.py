"""The source's connections to one target: how they are made, and what each of them does."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diptych.core.errors import HandshakeError, TransferError
from diptych.core.fleet import KVEndpoint, WorkerId
from diptych.core.kv_layout import LayerTransfer
from diptych.core.ports import PageSource
from diptych.policy.resharding import incompatibilities
from diptych.transfer import frames
from diptych.transfer.digest import span_digests, unit_digests
from diptych.transfer.local import LocalEndpoint
from diptych.transfer.memory import map_memory, scratch_memory
from diptych.transfer.nixl import TRANSPORTS
from diptych.transfer.nixl_link import nixl_writer
from diptych.transfer.pieces import FRAME_BYTES, Piece
from diptych.transfer.places import Places
from diptych.transfer.writers import InlineWriter, MappedWriter, PageWriter
from diptych.wire.blocking import STALL_SECONDS, BlockingConnection, dial
from diptych.wire.messages import WIRE_VERSION

Connection = BlockingConnection[frames.FromTarget]
Endpoint = KVEndpoint | LocalEndpoint

MAX_RANKS = 1024  # of a target


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who pushes: what a source says of itself and proves."""

    key: bytes = field(repr=False)
    worker_id: WorkerId
    model_digest: str


def connect(endpoint: Endpoint, identity: Identity) -> Connection:
    """A connection that is proven, and on which nothing has been said."""
    if isinstance(endpoint, LocalEndpoint):
        return endpoint.dial()
    connection: Connection = dial(endpoint.address, identity.key, frames.FromTarget)
    return connection


def introduce(
    connection: Connection, endpoint: Endpoint, identity: Identity, sources: Sequence[PageSource]
) -> tuple[frames.PushWelcome, PageWriter]:
    """Say who we are, and learn whom we write to, and how. Raises HandshakeError if we are not welcome."""
    layout = sources[0].layout
    nixl = isinstance(endpoint, KVEndpoint) and endpoint.transport in TRANSPORTS
    connection.send(frames.PushHello(WIRE_VERSION, identity.worker_id, layout, identity.model_digest, nixl))
    welcome = connection.receive(STALL_SECONDS)
    if isinstance(welcome, frames.Refused):
        raise HandshakeError(f"it refused the data connection: {welcome.message[:1000]}")
    if not isinstance(welcome, frames.PushWelcome):
        raise HandshakeError("it did not welcome the data connection")
    target = welcome.layout
    if reasons := incompatibilities(layout, target):
        raise HandshakeError(f"its KV layout cannot be made from ours: {'; '.join(reasons)}")
    if isinstance(endpoint, LocalEndpoint):
        return welcome, MappedWriter(endpoint.memories)
    if nixl:
        return welcome, nixl_writer(connection, welcome, sources, measure=endpoint.transport == "fastest")
    if endpoint.transport != "shm":
        return welcome, InlineWriter()
    if not target.world_size == welcome.num_descriptors <= MAX_RANKS:
        raise HandshakeError(f"it shares the memory of {welcome.num_descriptors} ranks out of {target.world_size}")
    memories = [
        map_memory(connection.receive_descriptor(), target, welcome.num_blocks, rank)
        for rank in range(target.world_size)
    ]
    return welcome, MappedWriter(memories)


class Stream:
    """One connection of a link, for the thread that owns it. Whoever answers to the target may send on it, too."""

    def __init__(self, connection: Connection | None = None) -> None:
        self.connection = connection
        self._send_lock = threading.Lock()
        self._scratch = memoryview(b"")

    def send(self, message: object, payload: Sequence[memoryview] = ()) -> None:
        """Raises TransferError or OSError if the connection is over."""
        with self._send_lock:
            if self.connection is None:
                raise TransferError("no data connection")
            self.connection.send(message, payload)

    def send_at_once(self, message: object) -> bool:
        """Send something small, unless that means to wait. False if it does, or if there is no connection (yet)."""
        if not self._send_lock.acquire(blocking=False):
            return False
        try:
            if self.connection is None or not self.connection.is_free:
                return False
            self.connection.send(message)
            return True
        finally:
            self._send_lock.release()

    def hang_up(self) -> None:
        """Close the connection."""
        if self.connection is not None:
            self.connection.end()  # wakes whoever is sending on it
        with self._send_lock:
            connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()

    def write(
        self,
        writer: PageWriter,
        transfers: Sequence[LayerTransfer],
        pieces: Sequence[Piece],
        sources: Sequence[PageSource] | Mapping[int, PageSource],
    ) -> tuple[bytes, list[memoryview]]:
        """Move one frame: these pieces of each of the layers. Returns the digests of their units, and the bytes for
        the frame itself."""
        digests: list[bytes] = []
        payload: list[memoryview] = []
        used = 0  # of the scratch memory, by what is still to be sent
        for transfer, piece in itertools.product(transfers, pieces):
            layer = sources[transfer.source_rank].layer(transfer.layer)
            piece.source.check(len(layer))
            staged = self._stage(piece.source, layer, used) if writer.needs_staging(piece) else None
            inline = writer.write(transfer, piece, layer, staged)
            digests.append(_digests(piece, layer, staged))  # after the copy, which has brought it into the cache
            payload += inline
            if inline and staged is not None:
                used += len(staged)
        return b"".join(digests), payload

    def _stage(self, places: Places, layer: memoryview, used: int) -> memoryview:
        """Gather scattered bytes. Good until the next frame."""
        if len(self._scratch) < used + places.nbytes:  # what is in the old one stays there until it is sent
            self._scratch = scratch_memory(max(FRAME_BYTES, used + places.nbytes))
        staged = self._scratch[used : used + places.nbytes]
        places.gather(layer, staged)
        return staged


def _digests(piece: Piece, layer: memoryview, staged: memoryview | None) -> bytes:
    if staged is not None:
        return unit_digests([staged], piece.unit_ends)
    if piece.spans is not None:
        return span_digests(layer, piece.spans)
    return unit_digests(piece.source.views(layer), piece.unit_ends)
