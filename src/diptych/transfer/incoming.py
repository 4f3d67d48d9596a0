"""What a target knows of the tickets that it has granted: who writes for them, and what has arrived.

No I/O: the receiver's threads ask here what a frame means, under one lock.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from diptych.core.blocks import BlockId
from diptych.core.errors import TicketError, TransferError
from diptych.core.ticket import TicketClaims
from diptych.transfer import frames
from diptych.transfer.digest import DIGEST_BYTES

Writer = object  # a data connection, by identity


@dataclass(slots=True, eq=False)
class Incoming:
    """One granted ticket. `verified` has a byte for each (layer, missing block)."""

    claims: TicketClaims
    num_layers: int
    writer: Writer | None = None
    writer_gone: bool = False  # there was one, and there will be no other
    revoked: bool = False
    released: bool = False  # first it was revoked, and then its writer went
    failed: bool = False
    verified: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self.verified = bytearray(self.num_layers * self.num_missing)

    @property
    def num_missing(self) -> int:
        return len(self.claims.blocks) - self.claims.first_block

    @property
    def complete(self) -> bool:
        return all(self.verified)

    def target_blocks(self, pages: frames.Pages) -> tuple[BlockId, ...]:
        """The physical blocks that these pages belong in. Raises TransferError if they belong nowhere."""
        if len(pages.digests) % DIGEST_BYTES:
            raise TransferError(f"{len(pages.digests)} bytes are no whole number of digests")
        first, end = pages.first_block, pages.first_block + pages.num_blocks
        if not 0 <= pages.layer < self.num_layers or not self.claims.first_block <= first < end <= len(
            self.claims.blocks
        ):
            raise TransferError(f"pages of layer {pages.layer}, blocks {first} to {end} were not asked for")
        return self.claims.blocks[first:end]

    def mark(self, pages: frames.Pages) -> bool:
        """These pages are verified. False if some had been before."""
        start = pages.layer * self.num_missing + pages.first_block - self.claims.first_block
        end = start + pages.num_blocks
        fresh = not any(self.verified[start:end])
        self.verified[start:end] = b"\x01" * pages.num_blocks
        return fresh


class TicketBook:
    """All tickets that are out. `counts` says what was turned away, by reason."""

    def __init__(self, epoch: int, num_layers: int) -> None:
        self._epoch = epoch
        self._num_layers = num_layers
        self._lock = threading.Lock()
        self._tickets: dict[str, Incoming] = {}
        self.counts: Counter[str] = Counter()

    def count(self, reason: str) -> None:
        """Something was turned away."""
        with self._lock:
            self.counts[reason] += 1

    def expect(self, claims: TicketClaims) -> None:
        """A ticket has been granted."""
        with self._lock:
            self._tickets[claims.request_id] = Incoming(claims, self._num_layers)

    def begin(self, request_id: str, nonce: bytes, epoch: int, writer: Writer) -> None:
        """Somebody wants to write. Raises TicketError if this ticket is not (or no longer) good."""
        with self._lock:
            ticket = self._tickets.get(request_id)
            if ticket is None or ticket.claims.nonce != nonce or epoch != self._epoch:
                self.counts["unknown ticket"] += 1
                raise TicketError("this ticket is not known here, or no longer")
            if ticket.writer is not None or ticket.writer_gone or ticket.revoked:
                self.counts["used ticket"] += 1
                raise TicketError("this ticket has been used")
            ticket.writer = writer

    def find(self, request_id: str, nonce: bytes, epoch: int, writer: Writer) -> Incoming | None:
        """The ticket that a frame is about, if it is this writer's and still wanted; else it is counted."""
        with self._lock:
            ticket = self._tickets.get(request_id)
            if ticket is None or ticket.claims.nonce != nonce or epoch != self._epoch or ticket.writer is not writer:
                self.counts["stray frame"] += 1
                return None
            if ticket.revoked or ticket.failed:
                self.counts["late frame"] += 1
                return None
            return ticket

    def mark(self, ticket: Incoming, pages: frames.Pages) -> None:
        """Verified pages are in place."""
        with self._lock:
            if not ticket.mark(pages):
                self.counts["duplicate pages"] += 1

    def close(self, ticket: Incoming) -> bool:
        """The writer says that this is all. True if it is; then the ticket is used up.

        Raises TransferError if pages are missing."""
        with self._lock:
            if ticket.revoked or ticket.failed:
                return False
            if not ticket.complete:
                raise TransferError("the hand-off was closed before all pages had arrived")
            del self._tickets[ticket.claims.request_id]
            return True

    def fail(self, ticket: Incoming) -> bool:
        """Something is wrong with what was written. True the first time, unless nobody cares any more."""
        with self._lock:
            first = not ticket.failed and not ticket.revoked
            ticket.failed = True
            if first:
                self.counts["failed hand-off"] += 1
            return first

    def revoke(self, request_id: str) -> tuple[Incoming | None, Writer | None]:
        """The ticket is wanted no more: (the ticket if it was out, its writer if there is one to be told).

        Without a writer the ticket is forgotten at once: nobody can begin it any more."""
        with self._lock:
            ticket = self._tickets.get(request_id)
            if ticket is None:
                return None, None
            ticket.revoked = True
            if ticket.writer is None:
                del self._tickets[request_id]
            return ticket, ticket.writer

    def stopped(self, request_id: str, nonce: bytes, writer: Writer) -> Incoming | None:
        """The writer of a ticket will write no more. Returns the ticket if it was still out."""
        with self._lock:
            ticket = self._tickets.get(request_id)
            if ticket is None or ticket.claims.nonce != nonce or ticket.writer is not writer:
                return None
            self._writer_is_gone(ticket)
            return ticket

    def writer_lost(self, writer: Writer) -> list[Incoming]:
        """A data connection has ended. Returns the tickets that it was writing for."""
        with self._lock:
            tickets = [ticket for ticket in self._tickets.values() if ticket.writer is writer]
            for ticket in tickets:
                self._writer_is_gone(ticket)
            return tickets

    def _writer_is_gone(self, ticket: Incoming) -> None:
        ticket.writer, ticket.writer_gone = None, True
        if ticket.revoked:
            ticket.released = True
            del self._tickets[ticket.claims.request_id]
