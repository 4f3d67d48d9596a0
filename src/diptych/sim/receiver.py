"""The target's side of data connections, as in `transfer.receiver`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diptych.core.events import HandoffComplete, HandoffFailed, WriterGone
from diptych.core.kv_layout import LayerTransfer
from diptych.core.ticket import TicketClaims
from diptych.sim import frames
from diptych.sim.network import End, Pipe
from diptych.sim.tickets import Ending, Ticket, Tickets
from diptych.sim.violation import Violation

if TYPE_CHECKING:
    from diptych.sim.life import Life


class Receiver:
    """Takes pages in for one life of a worker."""

    def __init__(self, owner: Life) -> None:
        self._owner = owner
        self.tickets = Tickets(owner.epoch, owner.engine.layout.num_layers)
        self.peers: dict[Peer, None] = {}  # in order, so that a seed is the same history everywhere

    def adopt(self, source: Life, answers: Pipe, *, mapped: bool) -> Peer:
        """A data connection has been made."""
        peer = Peer(self._owner, self, source, answers, mapped=mapped)
        self.peers[peer] = None
        return peer

    def expect(self, claims: TicketClaims) -> None:
        """A ticket is out."""
        self.tickets.expect(claims)

    def revoke(self, request_id: str) -> None:
        """Accept nothing more for this request. Reports WriterGone, once, when nobody can write for it."""
        ticket, writer = self.tickets.revoke(request_id)
        if ticket is None or writer is None:
            self._owner.post(WriterGone(request_id))
        elif isinstance(writer, Peer):
            writer.tell(frames.Cancel(request_id, ticket.claims.nonce))

    def close(self) -> None:
        """End all connections; those whose sources write to our memory are over when the sources have hung up."""
        for peer in list(self.peers):
            peer.hang_up()

    def written_by(
        self, writer: Peer, claims: TicketClaims, transfers: Sequence[LayerTransfer], content: Sequence[bytes]
    ) -> None:
        """A source on this host puts bytes into our memory, whether or not we look. It must still have the right to."""
        if self._owner.killed:
            return  # its memory is nobody's any more
        ticket = self.tickets.out.get(claims.request_id)
        if writer not in self.peers or ticket is None or ticket.writer is not writer:
            raise Violation(
                f"{writer.source.name} writes pages of {claims.request_id} into blocks of {self._owner.name} "
                "that it has no leave for"
            )
        frames.write(transfers, content, self._owner.memories)


class Peer:
    """One source's connection."""

    def __init__(self, owner: Life, receiver: Receiver, source: Life, answers: Pipe, *, mapped: bool) -> None:
        self.source = source
        self._owner = owner
        self._receiver = receiver
        self._tickets = receiver.tickets
        self._answers = answers
        self._mapped = mapped
        self._ending = False

    def tell(self, answer: object) -> None:
        self._answers.send(answer)

    def receive(self, frame: object) -> None:
        """One frame, or the end."""
        if isinstance(frame, End):
            self.hang_up()
            self._over()
        elif not self._ending:
            self._take(frame)

    def hang_up(self) -> None:
        """End the connection; a source that writes to our memory has to end it too before it is over."""
        self._ending = True
        self._answers.end()
        if not self._mapped:
            self._over()

    def _take(self, frame: object) -> None:
        match frame:
            case frames.Begin(request_id, nonce, epoch):
                if self._tickets.begin(request_id, nonce, epoch, self):
                    self.tell(frames.Go(request_id, nonce))
                else:
                    message = "this ticket is not known here, or no longer, or has been used"
                    self.tell(frames.Rejected(request_id, nonce, "ticket_refused", message))
            case frames.Pages():
                self._pages(frame)
            case frames.Close():
                self._close(frame)
            case frames.Stopped(request_id, nonce):
                ticket = self._tickets.stopped(request_id, nonce, self)
                if ticket is not None:
                    self._gone(ticket, "handoff_abandoned", f"{self.source.name} has given the hand-off up")
            case _:
                raise TypeError(f"a source said {frame}")

    def _pages(self, frame: frames.Pages) -> None:
        ticket = self._tickets.find(frame.request_id, frame.nonce, frame.epoch, self)
        if ticket is None:
            return
        pages = {(frame.layer, block) for block in frame.blocks}
        memories = self._owner.memories
        if frame.payload is not None:
            frames.write(frame.transfers, frame.payload, memories)
        if frames.arrived(frame.transfers, memories) == frame.digest:
            ticket.missing -= pages
        else:
            self._owner.tell("finds pages of {} from {} corrupt", frame.request_id, self.source.name)
            self._fail(ticket, "kv_corrupt", f"pages of layer {frame.layer} are corrupt")
        self._ended(ticket, self._tickets.frame_done(ticket))

    def _close(self, frame: frames.Close) -> None:
        ticket = self._tickets.find(frame.request_id, frame.nonce, frame.epoch, self)
        if ticket is None:
            return
        self._ended(ticket, self._tickets.close(ticket, frame.num_frames, frame.token))

    def _ended(self, ticket: Ticket, ending: Ending | None) -> None:
        """All frames that were announced have come."""
        request_id, nonce = ticket.claims.request_id, ticket.claims.nonce
        if ending is Ending.COMPLETE and ticket.token is not None:
            self._owner.world.outcome.handoffs += 1
            self._owner.tell("has all pages of {} from {}", request_id, self.source.name)
            self._owner.post(HandoffComplete(request_id, ticket.token))
            self.tell(frames.Accepted(request_id, nonce))
        elif ending is Ending.INCOMPLETE:
            self._fail(ticket, "transfer_failed", "the hand-off was closed before all pages had arrived")

    def _fail(self, ticket: Ticket, code: str, message: str) -> None:
        request_id = ticket.claims.request_id
        if self._tickets.fail(ticket):
            self.tell(frames.Rejected(request_id, ticket.claims.nonce, code, message))
            self._owner.post(HandoffFailed(request_id, code, message))

    def _over(self) -> None:
        """The connection is over: whatever it was writing for is not coming."""
        if self not in self._receiver.peers:
            return
        del self._receiver.peers[self]
        for ticket in self._tickets.writer_lost(self):
            self._gone(ticket, "transfer_failed", f"the data connection of {self.source.name} ended")
        self._owner.check_closed()

    def _gone(self, ticket: Ticket, code: str, message: str) -> None:
        """A ticket's writer is gone: the end of a revocation, or the failure that leads to one."""
        if ticket.released:
            self._owner.post(WriterGone(ticket.claims.request_id))
        elif self._tickets.fail(ticket):
            self._owner.post(HandoffFailed(ticket.claims.request_id, code, message))
