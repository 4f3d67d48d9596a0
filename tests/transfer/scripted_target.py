"""A target that says exactly what a test wants it to say, and a source that it has met."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transfer_harness import KEY, LAYOUT, NUM_BLOCKS, TOKEN, Gate, Inbox, claims_for, page_digests, random_memory

from diptych.core.fleet import KVEndpoint
from diptych.core.kv_layout import KVMemory
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import plan_transfer
from diptych.transfer import frames
from diptych.transfer.memory import SharedMemory
from diptych.transfer.sender import Identity, PushLink, WrapWriter
from diptych.transfer.writers import PageWriter
from diptych.wire.blocking import BlockingConnection, accept, listening_socket
from diptych.wire.messages import WIRE_VERSION

LAYERS = range(LAYOUT.num_layers)
SOURCE_BLOCKS = [9, 3, 4]
BLOCKS = (5, 6, 2)
IDENTITY = Identity(key=KEY, worker_id="prefill-0", model_digest="model")
NOTHING_SECONDS = 0.02  # long enough to notice something that should not come


def welcome(num_blocks: int, num_descriptors: int = 1) -> frames.PushWelcome:
    return frames.PushWelcome(LAYOUT, num_blocks, int(num_descriptors), b"link")


class ScriptedTarget:
    """Listens; after `meet`, says exactly what a test wants it to say."""

    def __init__(self, transport: str, directory: Path) -> None:
        address = f"unix:{directory / 'target'}" if transport == "shm" else "tcp:127.0.0.1:0"
        self._listener, address = listening_socket(address)
        self.endpoint = KVEndpoint(transport=transport, address=address)
        self.segment = SharedMemory(LAYOUT.num_layers * NUM_BLOCKS * LAYOUT.block_bytes)
        self.connection: BlockingConnection[Any] | None = None

    def accept(self) -> BlockingConnection[Any]:
        """The next connection, of which nothing but the key is known."""
        return accept(self._listener.accept()[0], KEY, frames.FromSource)

    def hear_hello(self) -> None:
        self.connection = self.accept()
        assert self.next() == frames.PushHello(WIRE_VERSION, "prefill-0", LAYOUT, "model", False)

    def meet(self) -> None:
        self.hear_hello()
        self.say(welcome(NUM_BLOCKS, self.endpoint.transport == "shm"))
        if self.endpoint.transport == "shm":
            self.connected.send_descriptor(self.segment.descriptor)

    @property
    def connected(self) -> BlockingConnection[Any]:
        assert self.connection is not None
        return self.connection

    def say(self, message: object) -> None:
        self.connected.send(message)

    def next(self) -> Any:
        return self.connected.receive(20)

    def begun(self, claims: TicketClaims) -> None:
        assert self.next() == frames.Begin(claims.request_id, claims.nonce, claims.epoch)

    def go(self, claims: TicketClaims) -> None:
        self.begun(claims)
        self.say(frames.Go(claims.request_id, claims.nonce))

    def take_pages(self, claims: TicketClaims, layer: int, source: KVMemory) -> None:
        """The next frame is this layer's pages of the whole request, with its payload."""
        digests = page_digests(source, layer, SOURCE_BLOCKS)
        nbytes = 0 if self.endpoint.transport == "shm" else len(BLOCKS) * LAYOUT.block_bytes
        assert self.next() == frames.Pages(
            claims.request_id, claims.nonce, claims.epoch, layer, 1, 0, 0, digests, nbytes
        )
        self.connected.discard(nbytes)

    def hears_nothing(self) -> None:
        with pytest.raises(TimeoutError):
            self.connected.receive(NOTHING_SECONDS)

    def close(self) -> None:
        self._listener.close()
        if self.connection is not None:
            self.connection.close()
        self.segment.close()


class Encounter:
    """One link from a source to a scripted target."""

    def __init__(self, target: ScriptedTarget, wrap: WrapWriter, num_streams: int) -> None:
        self.target = target
        self.source = random_memory(1)
        self.events = Inbox()
        self.link = PushLink(
            "decode-0", target.endpoint, IDENTITY, [self.source], self.events.put, wrap, num_streams=num_streams
        )

    def push(self, claims: TicketClaims, layers: Sequence[int] = LAYERS, *, close: bool = True) -> None:
        plan = plan_transfer(LAYOUT, LAYOUT, SOURCE_BLOCKS, claims.blocks, first_block=0)
        for layer in layers:
            self.link.push(claims.request_id, claims, plan, [layer])
        if close:
            self.link.close_handoff(claims.request_id, claims, TOKEN)

    def abandon(self, claims: TicketClaims) -> None:
        self.link.abandon(claims.request_id, claims)


@contextlib.contextmanager
def encounter(
    transport: str, directory: Path, wrap: WrapWriter = lambda writer: writer, num_streams: int = 1
) -> Iterator[Encounter]:
    target = ScriptedTarget(transport, directory)
    made = Encounter(target, wrap, num_streams)
    try:
        yield made
    finally:
        if target.connection is not None:
            target.connection.end()
        made.link.end()
        target.close()


@contextlib.contextmanager
def writing(directory: Path, num_streams: int = 1) -> Iterator[tuple[Encounter, Gate, TicketClaims]]:
    """A source in the middle of a write to mapped memory."""
    gates: list[Gate] = []

    def wrap(writer: PageWriter) -> PageWriter:
        gates.append(Gate(writer))
        return gates[0]

    with encounter("shm", directory, wrap, num_streams) as made:
        claims = claims_for("r1", BLOCKS)
        made.target.meet()
        made.push(claims)
        made.target.go(claims)
        assert gates[0].begun.wait(20)
        try:
            yield made, gates[0], claims
        finally:
            gates[0].may_go_on.set()
