"""What a target knows of the tickets that are out: the rules of `transfer.incoming`, without its frames and locks.

(That module is made of message and digest libraries, so a pure package cannot use it; a test drives the two
with the same calls and compares their answers.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from diptych.core.blocks import BlockId
from diptych.core.request import SampledToken
from diptych.core.ticket import TicketClaims

Writer = object  # a data connection, by identity
Page = tuple[int, int]  # layer, logical block


class Ending(Enum):
    """What the last frame of a ticket brought about."""

    COMPLETE = auto()
    INCOMPLETE = auto()  # pages are missing


@dataclass(slots=True, eq=False)
class Ticket:
    """One that was granted, and who writes for it."""

    claims: TicketClaims
    writer: Writer | None = None
    writer_gone: bool = False
    revoked: bool = False
    released: bool = False  # first it was revoked, and then its writer went
    failed: bool = False
    frames: int = 0  # of pages, that have come
    announced: int | None = None  # how many there are, once it is closed
    token: SampledToken | None = None  # from which decode goes on
    missing: set[Page] = field(default_factory=set)  # not verified yet

    @property
    def writable(self) -> tuple[BlockId, ...]:
        """The blocks that its writer may write to."""
        return self.claims.blocks[self.claims.first_block :]


class Tickets:
    """All that are out, of one life of one worker."""

    def __init__(self, epoch: int, num_layers: int) -> None:
        self._epoch = epoch
        self._num_layers = num_layers
        self.out: dict[str, Ticket] = {}

    def expect(self, claims: TicketClaims) -> None:
        """A ticket has been granted."""
        blocks = range(claims.first_block, len(claims.blocks))
        pages = {(layer, block) for layer in range(self._num_layers) for block in blocks}
        self.out[claims.request_id] = Ticket(claims, missing=pages)

    def begin(self, request_id: str, nonce: bytes, epoch: int, writer: Writer) -> bool:
        """Somebody wants to write. False if this ticket is not (or no longer) good."""
        ticket = self.out.get(request_id)
        if ticket is None or ticket.claims.nonce != nonce or epoch != self._epoch:
            return False
        if ticket.writer is not None or ticket.writer_gone or ticket.revoked:
            return False
        ticket.writer = writer
        return True

    def find(self, request_id: str, nonce: bytes, epoch: int, writer: Writer) -> Ticket | None:
        """The ticket that a frame is about, if it is this writer's and still wanted."""
        ticket = self.out.get(request_id)
        if ticket is None or ticket.claims.nonce != nonce or epoch != self._epoch or ticket.writer is not writer:
            return None
        return None if ticket.revoked or ticket.failed else ticket

    def frame_done(self, ticket: Ticket) -> Ending | None:
        """One more frame of pages has been looked at, whatever it was worth; what that brings about."""
        ticket.frames += 1
        return self._ending(ticket)

    def close(self, ticket: Ticket, num_frames: int, token: SampledToken) -> Ending | None:
        """The writer says that this is all; what that brings about by now."""
        ticket.announced, ticket.token = num_frames, token
        return self._ending(ticket)

    def _ending(self, ticket: Ticket) -> Ending | None:
        if ticket.announced is None or ticket.revoked or ticket.failed or ticket.frames < ticket.announced:
            return None
        if ticket.missing:
            return Ending.INCOMPLETE
        del self.out[ticket.claims.request_id]
        return Ending.COMPLETE

    def fail(self, ticket: Ticket) -> bool:
        """Something is wrong with what was written. True the first time, unless nobody cares any more."""
        first = not ticket.failed and not ticket.revoked
        ticket.failed = True
        return first

    def revoke(self, request_id: str) -> tuple[Ticket | None, Writer | None]:
        """The ticket is wanted no more: (the ticket if it was out, its writer if there is one to be told)."""
        ticket = self.out.get(request_id)
        if ticket is None:
            return None, None
        ticket.revoked = True
        if ticket.writer is None:
            del self.out[request_id]
        return ticket, ticket.writer

    def stopped(self, request_id: str, nonce: bytes, writer: Writer) -> Ticket | None:
        """The writer of a ticket will write no more. Returns the ticket if it was still out."""
        ticket = self.out.get(request_id)
        if ticket is None or ticket.claims.nonce != nonce or ticket.writer is not writer:
            return None
        self._writer_is_gone(ticket)
        return ticket

    def writer_lost(self, writer: Writer) -> list[Ticket]:
        """A data connection has ended. Returns the tickets that it was writing for."""
        tickets = [ticket for ticket in self.out.values() if ticket.writer is writer]
        for ticket in tickets:
            self._writer_is_gone(ticket)
        return tickets

    def _writer_is_gone(self, ticket: Ticket) -> None:
        ticket.writer, ticket.writer_gone = None, True
        if ticket.revoked:
            ticket.released = True
            del self.out[ticket.claims.request_id]
