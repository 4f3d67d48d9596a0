"""A source between any two layouts that says exactly what a test wants it to say, right or wrong."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

from transfer_harness import EPOCH, KEY, TOKEN, World

from diptych.core.fleet import KVEndpoint
from diptych.core.kv_layout import KVLayout, LayerTransfer, TransferPlan
from diptych.core.ticket import TicketClaims
from diptych.transfer import frames
from diptych.transfer.digest import unit_digests
from diptych.transfer.local import LocalEndpoint
from diptych.transfer.pieces import Piece, PlanPieces
from diptych.wire.blocking import BlockingConnection, dial
from diptych.wire.codec import encode_frame
from diptych.wire.messages import WIRE_VERSION


@dataclass(frozen=True, slots=True)
class Sendable:
    """A piece with its message, and the bytes that belong to it."""

    frame: frames.Pages
    transfer: LayerTransfer
    piece: Piece
    content: bytes

    @property
    def key(self) -> tuple[int, int, int]:
        return self.frame.layer, self.frame.pair, self.frame.first_group


class RawSource:
    """One connection. Raises HandshakeError if it is refused for its key."""

    def __init__(
        self, world: World, *, layout: KVLayout | None = None, key: bytes = KEY, joins: RawSource | None = None
    ) -> None:
        self._world = world
        endpoint = world.endpoint
        self.mapped = isinstance(endpoint, LocalEndpoint) or endpoint.transport == "shm"
        self.connection: BlockingConnection[frames.FromTarget] = (
            endpoint.dial() if isinstance(endpoint, LocalEndpoint) else dial(endpoint.address, key, frames.FromTarget)
        )
        self.joined = False  # by leave of the target
        self.sent: dict[bytes, int] = {}  # frames of pages, by nonce
        if joins is not None:
            self.sent, self.welcome = joins.sent, joins.welcome
            self.connection.send(frames.Join(joins.welcome.link))
            with contextlib.suppress(ConnectionError):
                self.joined = self.connection.receive(20) == frames.Joined()
            return
        layout = world.source.layout if layout is None else layout
        self.connection.send(frames.PushHello(WIRE_VERSION, "prefill-1", layout, "model", False))
        self.welcome: Any = self.connection.receive()
        if isinstance(endpoint, KVEndpoint) and self.mapped and isinstance(self.welcome, frames.PushWelcome):
            for _ in range(self.welcome.num_descriptors):
                os.close(self.connection.receive_descriptor())

    def join(self) -> RawSource:
        """A further connection of the same link."""
        assert isinstance(self.welcome, frames.PushWelcome)
        return RawSource(self._world, joins=self)

    def frames_of(self, claims: TicketClaims, plan: TransferPlan) -> list[Sendable]:
        """Everything that a plan moves."""
        cut = PlanPieces(plan, self._world.source.layout, claims)
        found = []
        for layer in range(claims.layout.num_layers):
            for pair, [transfer], pieces in cut.of_layers([layer]):
                for index in range(len(pieces)):
                    piece = pieces[index]
                    source = self._world.sources[transfer.source_rank].layer(layer)
                    content = b"".join(piece.source.views(source))
                    digests = unit_digests([memoryview(content)], piece.unit_ends)
                    about = (claims.request_id, claims.nonce, claims.epoch, layer, 1, pair, piece.first_group, digests)
                    frame = frames.Pages(*about, 0 if self.mapped else len(content))
                    found.append(Sendable(frame, transfer, piece, content))
        return found

    def begin(self, claims: TicketClaims) -> Any:
        """Ask for leave to write; returns the answer."""
        self.connection.send(frames.Begin(claims.request_id, claims.nonce, claims.epoch))
        return self.connection.receive(20)

    def send(self, sendable: Sendable, content: bytes | None = None) -> None:
        """Have a piece arrive, with these bytes instead of its own."""
        content = sendable.content if content is None else content
        if self.mapped:
            target = self._world.targets[sendable.transfer.target_rank].layer(sendable.transfer.layer)
            sendable.piece.target.scatter(memoryview(content), target)
        self.announce(sendable, content)

    def announce(self, sendable: Sendable, content: bytes) -> None:
        """The same, but without writing to mapped memory."""
        if sendable.frame.epoch == EPOCH:
            self.sent[sendable.frame.nonce] = self.sent.get(sendable.frame.nonce, 0) + 1
        self.connection.send(sendable.frame, () if self.mapped else [memoryview(content)])

    def send_torn(self, sendable: Sendable, share: float) -> None:
        """Only the beginning of a frame."""
        whole = encode_frame(sendable.frame) + (b"" if self.mapped else sendable.content)
        self.send_raw(whole[: max(int(len(whole) * share), 1)])

    def send_raw(self, data: bytes) -> None:
        self.connection._socket.sendall(data)

    def close_handoff(self, claims: TicketClaims) -> None:
        num_frames = self.sent.get(claims.nonce, 0)
        self.connection.send(frames.Close(claims.request_id, claims.nonce, claims.epoch, num_frames, TOKEN, b""))

    def stopped(self, claims: TicketClaims) -> None:
        self.connection.send(frames.Stopped(claims.request_id, claims.nonce))

    def hears(self, kind: Any) -> Any:
        answer = self.connection.receive(20)
        assert isinstance(answer, kind), answer
        return answer

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.end()
            self.connection.close()

    def __enter__(self) -> RawSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
