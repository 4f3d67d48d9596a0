"""A source, a target and their memories in one process, joined by real sockets."""

from __future__ import annotations

import contextlib
import os
import queue
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.core.fleet import KVEndpoint
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.request import SampledToken
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import plan_transfer
from diptych.transfer import frames
from diptych.transfer.digest import layer_digests
from diptych.transfer.local import LocalEndpoint
from diptych.transfer.memory import SharedMemory
from diptych.transfer.receiver import KVReceiver, Target
from diptych.transfer.sender import Identity, PushLink, WrapWriter
from diptych.wire.blocking import BlockingConnection, dial
from diptych.wire.messages import WIRE_VERSION

KEY = b"k" * 32
EPOCH = 7
LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype="float32", block_size=4)
NUM_BLOCKS = 24
TOKEN = SampledToken(42, -0.5, ((42, -0.5),))
SOCKET_TRANSPORTS = ("shm", "tcp", "tls")
TRANSPORTS = (*SOCKET_TRANSPORTS, "local")


def random_memory(seed: int, layout: KVLayout = LAYOUT) -> KVMemory:
    size = layout.num_layers * NUM_BLOCKS * layout.block_bytes
    return KVMemory(layout, NUM_BLOCKS, memoryview(bytearray(random.Random(seed).randbytes(size))))


def claims_for(request_id: str, blocks: tuple[int, ...], first_block: int = 0, epoch: int = EPOCH) -> TicketClaims:
    return TicketClaims(
        request_id=request_id,
        worker_id="decode-0",
        epoch=epoch,
        blocks=blocks,
        first_block=first_block,
        num_tokens=len(blocks) * LAYOUT.block_size,
        layout=LAYOUT,
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
    source: KVMemory
    target: KVMemory
    receiver: KVReceiver
    at_target: Inbox
    at_source: Inbox = field(default_factory=Inbox)
    links: list[PushLink] = field(default_factory=list)

    def link(self, wrap: WrapWriter = lambda writer: writer) -> PushLink:
        identity = Identity(key=KEY, worker_id="prefill-0", model_digest="model")
        self.links.append(PushLink("decode-0", self.endpoint, identity, self.source, self.at_source.put, wrap))
        return self.links[-1]

    def push_all(self, link: PushLink, claims: TicketClaims, source_blocks: list[int]) -> None:
        """Every layer of every missing block, then the end. `source_blocks` is the whole table."""
        first = claims.first_block
        plan = plan_transfer(LAYOUT, LAYOUT, source_blocks[first:], claims.blocks[first:], first_block=first)
        if plan.num_blocks:
            for layer in range(LAYOUT.num_layers):
                link.push(claims.request_id, claims, plan, layer)
        link.close_handoff(claims.request_id, claims, TOKEN)

    def block(self, memory: KVMemory, layer: int, block: int) -> bytes:
        size = memory.layout.block_bytes
        return bytes(memory.layer(layer)[block * size : (block + 1) * size])


@contextlib.contextmanager
def world(transport: str, directory: Path, seed: int = 0, layout: KVLayout = LAYOUT) -> Iterator[World]:
    segment = SharedMemory(layout.num_layers * NUM_BLOCKS * layout.block_bytes)
    target = KVMemory(layout, NUM_BLOCKS, segment.buffer)
    at_target = Inbox()
    about = Target(key=KEY, epoch=EPOCH, memory=target, model_digest="model", descriptor=segment.descriptor)
    receiver = KVReceiver(about, at_target.put)
    endpoint: KVEndpoint | LocalEndpoint = LocalEndpoint(receiver)
    if transport != "local":
        address = receiver.listen(f"unix:{directory / 'kv'}" if transport == "shm" else f"{transport}:127.0.0.1:0")
        endpoint = KVEndpoint(transport="shm" if transport == "shm" else "tcp", address=address)
    made = World(endpoint, random_memory(seed, layout), target, receiver, at_target)
    try:
        yield made
    finally:
        for link in made.links:
            link.end()
        receiver.close()
        target.buffer.release()
        with contextlib.suppress(BufferError):  # a captured log record may hold an error, and with it a view
            segment.close()


class ScriptedSource:
    """A source that says exactly what a test wants it to say."""

    def __init__(self, world: World, *, layout: str = LAYOUT.digest, model: str = "model", key: bytes = KEY) -> None:
        self._world = world
        endpoint = world.endpoint
        self.mapped = isinstance(endpoint, LocalEndpoint) or endpoint.transport == "shm"
        self.connection: BlockingConnection[frames.FromTarget] = (
            endpoint.dial() if isinstance(endpoint, LocalEndpoint) else dial(endpoint.address, key, frames.FromTarget)
        )
        self._descriptor: int | None = None
        self.connection.send(frames.PushHello(WIRE_VERSION, "prefill-1", layout, model))
        self.welcome = self.connection.receive()
        if self.welcome is not None and isinstance(endpoint, KVEndpoint) and self.mapped:
            self._descriptor = self.connection.receive_descriptor()

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
            "first_block": claims.first_block,
            "digests": layer_digests(self._world.source, layer, wanted),
            "nbytes": sum(len(page) for page in payload),
        }
        self.connection.send(frames.Pages(**(fields | changes)), payload)

    def close_handoff(self, claims: TicketClaims, /, **changes: Any) -> None:
        about = {"request_id": claims.request_id, "nonce": claims.nonce, "epoch": claims.epoch}
        fields = {**about, "token": TOKEN, "payload": b""}
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
        if self._descriptor is not None:
            os.close(self._descriptor)
