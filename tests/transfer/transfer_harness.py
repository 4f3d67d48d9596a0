"""A source, a target and their memories in one process, joined by real sockets."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diptych.core.fleet import KVEndpoint
from diptych.core.kv_layout import KVLayout, KVMemory, LayerTransfer, SequenceKV
from diptych.core.request import SampledToken
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import plan_resharding
from diptych.transfer import frames
from diptych.transfer.digest import unit_digests
from diptych.transfer.local import LocalEndpoint
from diptych.transfer.memory import SharedMemory, memory_bytes
from diptych.transfer.pieces import Piece
from diptych.transfer.receiver import KVReceiver, Target
from diptych.transfer.sender import Identity, PushLink, WrapWriter
from diptych.transfer.writers import PageWriter, Payload
from diptych.wire.blocking import BlockingConnection, dial
from diptych.wire.messages import WIRE_VERSION

KEY = b"k" * 32
EPOCH = 7
LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype="float32", block_size=4)
RESHARDED = replace(LAYOUT, tensor_parallel=2, block_size=8)  # a source whose KV has to be re-sharded for LAYOUT
NUM_BLOCKS = 24
TOKEN = SampledToken(42, -0.5, ((42, -0.5),))
SOCKET_TRANSPORTS = ("shm", "tcp", "tls")
TRANSPORTS = (*SOCKET_TRANSPORTS, "local")


def random_memory(seed: int, layout: KVLayout = LAYOUT, rank: int = 0) -> KVMemory:
    """Of one rank. Ranks with the same seed hold different bytes, so that no two could be mixed up."""
    size = memory_bytes(layout, NUM_BLOCKS, rank)
    return KVMemory(layout, NUM_BLOCKS, memoryview(bytearray(random.Random(seed + rank).randbytes(size))), rank)


def claims_for(
    request_id: str,
    blocks: tuple[int, ...],
    first_block: int = 0,
    *,
    epoch: int = EPOCH,
    layout: KVLayout = LAYOUT,
    num_tokens: int | None = None,
    data_rank: int = 0,
) -> TicketClaims:
    return TicketClaims(
        request_id=request_id,
        worker_id="decode-0",
        epoch=epoch,
        blocks=blocks,
        first_block=first_block,
        num_tokens=len(blocks) * layout.block_size if num_tokens is None else num_tokens,
        layout=layout,
        data_rank=data_rank,
        model_digest="model",
        salt="",
        nonce=os.urandom(16),
    )


class Inbox:
    """Events in order of arrival."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.put = self._events.put

    def next(self) -> Any:
        return self._events.get(timeout=20)

    @property
    def empty(self) -> bool:
        return self._events.empty()


@dataclass
class World:
    """`source` pushes to `target` over `endpoint`; what the two sides report lies in the inboxes."""

    endpoint: KVEndpoint | LocalEndpoint
    sources: tuple[KVMemory, ...]  # by rank
    targets: tuple[KVMemory, ...]
    receiver: KVReceiver
    at_target: Inbox
    at_source: Inbox = field(default_factory=Inbox)
    links: list[PushLink] = field(default_factory=list)

    @property
    def source(self) -> KVMemory:
        return self.sources[0]

    @property
    def target(self) -> KVMemory:
        return self.targets[0]

    def link(self, wrap: WrapWriter = lambda writer: writer, num_streams: int = 2) -> PushLink:
        identity = Identity(key=KEY, worker_id="prefill-0", model_digest="model")
        link = PushLink(
            "decode-0", self.endpoint, identity, self.sources, self.at_source.put, wrap, num_streams=num_streams
        )
        self.links.append(link)
        return link

    def push_all(self, link: PushLink, claims: TicketClaims, source_blocks: Sequence[int], data_rank: int = 0) -> None:
        """Every layer of everything that is missing, then the end. `source_blocks` is the whole table."""
        origin = SequenceKV(self.source.layout, source_blocks, data_rank=data_rank)
        there = SequenceKV(claims.layout, claims.blocks, data_rank=claims.data_rank)
        tokens = range(claims.first_block * claims.layout.block_size, claims.num_tokens)
        if tokens:
            plan = plan_resharding(origin, there, tokens)
            for layer in range(claims.layout.num_layers):
                link.push(claims.request_id, claims, plan, [layer])
        link.close_handoff(claims.request_id, claims, TOKEN)

    def block(self, memory: KVMemory, layer: int, block: int) -> bytes:
        size = memory.layout.block_bytes
        return bytes(memory.layer(layer)[block * size : (block + 1) * size])


@contextlib.contextmanager
def world(
    transport: str, directory: Path, seed: int = 0, layout: KVLayout = LAYOUT, target_layout: KVLayout | None = None
) -> Iterator[World]:
    target_layout = target_layout or layout
    ranks = range(target_layout.world_size)
    segments = [SharedMemory(memory_bytes(target_layout, NUM_BLOCKS, rank)) for rank in ranks]
    targets = tuple(KVMemory(target_layout, NUM_BLOCKS, segments[rank].buffer, rank) for rank in ranks)
    at_target = Inbox()
    descriptors = tuple(segment.descriptor for segment in segments)
    nixl = transport in ("nixl", "fastest")
    about = Target(key=KEY, epoch=EPOCH, memories=targets, model_digest="model", descriptors=descriptors, nixl=nixl)
    receiver = KVReceiver(about, at_target.put)
    endpoint: KVEndpoint | LocalEndpoint = LocalEndpoint(receiver)
    if transport != "local":
        scheme = "tls" if transport == "tls" else "tcp"
        address = receiver.listen(f"unix:{directory / 'kv'}" if transport == "shm" else f"{scheme}:127.0.0.1:0")
        endpoint = KVEndpoint(transport="tcp" if transport == "tls" else transport, address=address)
    sources = tuple(random_memory(seed, layout, rank) for rank in range(layout.world_size))
    made = World(endpoint, sources, targets, receiver, at_target)
    try:
        yield made
    finally:
        for link in made.links:
            link.end()
        receiver.close()
        for memory, segment in zip(targets, segments, strict=True):
            with contextlib.suppress(BufferError):  # a captured log record may hold an error, and with it a view
                memory.buffer.release()
            with contextlib.suppress(BufferError):
                segment.close()


def page_digests(memory: KVMemory, layer: int, blocks: Sequence[int]) -> bytes:
    """Of whole blocks, which are the units between equal layouts."""
    size = memory.layout.block_bytes
    return b"".join(unit_digests([memory.layer(layer)[block * size : (block + 1) * size]], [size]) for block in blocks)


class ScriptedSource:
    """A source that says exactly what a test wants it to say."""

    def __init__(self, world: World, *, layout: KVLayout = LAYOUT, model: str = "model", key: bytes = KEY) -> None:
        self._world = world
        self.num_frames = 0  # of pages that were sent for the one ticket that it has
        endpoint = world.endpoint
        self.mapped = isinstance(endpoint, LocalEndpoint) or endpoint.transport == "shm"
        self.connection: BlockingConnection[frames.FromTarget] = (
            endpoint.dial() if isinstance(endpoint, LocalEndpoint) else dial(endpoint.address, key, frames.FromTarget)
        )
        self._descriptors: list[int] = []
        self.connection.send(frames.PushHello(WIRE_VERSION, "prefill-1", layout, model, False))
        self.welcome = self.connection.receive()
        if isinstance(endpoint, KVEndpoint) and self.mapped and isinstance(self.welcome, frames.PushWelcome):
            self._descriptors = [self.connection.receive_descriptor() for _ in range(self.welcome.num_descriptors)]

    def begin(self, claims: TicketClaims) -> Any:
        """Ask for leave to write; returns the answer."""
        self.connection.send(frames.Begin(claims.request_id, claims.nonce, claims.epoch))
        return self.connection.receive()

    def pages(self, claims: TicketClaims, layer: int, /, **changes: Any) -> None:
        """One layer's missing pages, taken from equally numbered blocks of the source; any field of the
        message may be changed. `payload` is what follows it."""
        wanted = claims.blocks[claims.first_block :]
        in_order = [memoryview(self._world.block(self._world.source, layer, block)) for block in wanted]
        if self.mapped:
            for block, page in zip(wanted, in_order, strict=True):
                size = LAYOUT.block_bytes
                self._world.target.layer(layer)[block * size : (block + 1) * size] = page
        payload = changes.pop("payload", () if self.mapped else in_order)
        fields = {
            "request_id": claims.request_id,
            "nonce": claims.nonce,
            "epoch": claims.epoch,
            "layer": layer,
            "num_layers": 1,
            "pair": 0,
            "first_group": claims.first_block,
            "digests": page_digests(self._world.source, layer, wanted),
            "nbytes": sum(len(page) for page in payload),
        }
        self.connection.send(frames.Pages(**(fields | changes)), payload)
        self.num_frames += not changes.keys() & {"request_id", "nonce", "epoch"}

    def close_handoff(self, claims: TicketClaims, /, **changes: Any) -> None:
        about = {"request_id": claims.request_id, "nonce": claims.nonce, "epoch": claims.epoch}
        fields = {**about, "num_frames": self.num_frames, "token": TOKEN, "payload": b""}
        self.connection.send(frames.Close(**(fields | changes)))

    def stopped(self, claims: TicketClaims) -> None:
        self.connection.send(frames.Stopped(claims.request_id, claims.nonce))

    def hang_up(self) -> None:
        self.connection.end()
        self.connection.close()

    def __enter__(self) -> ScriptedSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        for descriptor in self._descriptors:
            os.close(descriptor)


class Gate:
    """A writer whose first write takes until it may go on."""

    def __init__(self, writer: PageWriter) -> None:
        self._writer = writer
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def needs_staging(self, piece: Piece) -> bool:
        return self._writer.needs_staging(piece)

    def write(
        self, transfer: LayerTransfer, piece: Piece, layer: memoryview, staged: memoryview | None = None
    ) -> Payload:
        if not self.begun.is_set():
            self.begun.set()
            assert self.may_go_on.wait(20)
        return self._writer.write(transfer, piece, layer, staged)

    def close(self) -> None:
        self._writer.close()
