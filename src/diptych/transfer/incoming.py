"""What a target knows of the tickets that it has granted: who writes for them, and what has arrived.

No I/O: the receiver's threads ask here what a frame means, under one lock. One ticket's frames may come over
several connections at once, so whatever ends it waits until all frames before that are done with.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto

from diptych.core.errors import TicketError
from diptych.core.kv_layout import KVLayout
from diptych.core.ticket import TicketClaims
from diptych.transfer import frames
from diptych.transfer.expected import Expected

Writer = object  # a link of data connections, by identity


class Ending(Enum):
    """What the last frame of a ticket brought about."""

    COMPLETE = auto()  # it was closed, and every unit is verified
    INCOMPLETE = auto()  # it was closed, and units are missing
    STOPPED = auto()  # its writer will write no more


@dataclass(slots=True, eq=False)
class Incoming:
    """One granted ticket. `expected` is what its writer has to send, known when there is one."""

    claims: TicketClaims
    expected: Expected | None = None
    writer: Writer | None = None
    writer_gone: bool = False  # there was one, and there will be no other
    revoked: bool = False
    released: bool = False  # first it was revoked, and then its writer went
    failed: bool = False
    complete: bool = False
    busy: int = 0  # threads that are working on a frame, or reporting what has come of it
    done: int = 0  # frames of pages that have been worked on
    closing: frames.Close | None = None
    stopped: bool = False  # its writer has said that it writes no more

    @property
    def wanted(self) -> bool:
        return not (self.revoked or self.failed or self.complete)

    def is_about(self, request_id: str, nonce: bytes) -> bool:
        return (self.claims.request_id, self.claims.nonce) == (request_id, nonce)


class TicketBook:
    """All tickets that are out."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._lock = threading.Lock()
        self._tickets: dict[str, Incoming] = {}
        self.counts: Counter[str] = Counter()

    def count(self, reason: str) -> None:
        """Something was turned away."""
        with self._lock:
            self.counts[reason] += 1

    def turned_away(self) -> tuple[tuple[str, int], ...]:
        """`counts`, now."""
        with self._lock:
            return tuple(sorted(self.counts.items()))

    def expect(self, claims: TicketClaims) -> None:
        """A ticket has been granted."""
        with self._lock:
            self._tickets[claims.request_id] = Incoming(claims)

    def begin(self, frame: frames.Begin, writer: Writer, layout: KVLayout) -> Expected:
        """Somebody wants to write KV of this layout: what that has to be. Raises TicketError if the ticket is not (or
        no longer) good."""
        with self._lock:
            ticket = self._tickets.get(frame.request_id)
            if ticket is None or ticket.claims.nonce != frame.nonce or frame.epoch != self._epoch:
                self.counts["unknown ticket"] += 1
                raise TicketError("this ticket is not known here, or no longer")
            if ticket.writer is not None or ticket.writer_gone or ticket.revoked:
                self.counts["used ticket"] += 1
                raise TicketError("this ticket has been used")
            ticket.expected = Expected(layout, ticket.claims)
            ticket.writer = writer
            return ticket.expected

    def enter(self, frame: frames.Pages, writer: Writer) -> Incoming | None:
        """A thread begins with a frame: the ticket that it is about, if it is this writer's; else it is counted.
        Unless the ticket is `wanted`, nothing but its end interests. `leave` has to follow."""
        with self._lock:
            ticket = self._find(frame, writer)
            if ticket is not None:
                ticket.busy += 1
            return ticket

    def leave(self, ticket: Incoming) -> Ending | None:
        """The thread is done with the frame, whatever it was worth."""
        with self._lock:
            ticket.busy -= 1
            ticket.done += 1
            return self._ending(ticket)

    def reported(self, ticket: Incoming) -> Ending | None:
        """What `leave` or `close` said has been passed on (COMPLETE, INCOMPLETE): now the ticket may end."""
        with self._lock:
            ticket.busy -= 1
            if not ticket.complete:
                return self._ending(ticket)
            self._writer_is_gone(ticket)
            return Ending.STOPPED if ticket.released else None

    def mark(self, ticket: Incoming, frame: frames.Pages) -> None:
        """Verified units are in place."""
        with self._lock:
            if ticket.expected is not None and not ticket.expected.mark(frame):
                self.counts["duplicate pages"] += 1

    def close(self, frame: frames.Close, writer: Writer) -> tuple[Incoming | None, Ending | None]:
        """The writer says that this is all: the ticket, and what that brought about by now."""
        with self._lock:
            ticket = self._find(frame, writer)
            if ticket is None or not ticket.wanted:
                return None, None
            ticket.closing = frame
            return ticket, self._ending(ticket)

    def fail(self, ticket: Incoming) -> bool:
        """Something is wrong with what was written. True the first time, unless nobody cares any more."""
        with self._lock:
            first = ticket.wanted
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

    def stop(self, frame: frames.Stopped, writer: Writer) -> tuple[Incoming | None, Ending | None]:
        """The writer of a ticket will write no more: the ticket if it was still out, and what that means by now."""
        with self._lock:
            ticket = self._tickets.get(frame.request_id)
            if ticket is None or ticket.claims.nonce != frame.nonce or ticket.writer is not writer:
                return None, None
            ticket.stopped = True
            return ticket, self._ending(ticket)

    def writer_lost(self, writer: Writer) -> list[Incoming]:
        """All connections of a link have ended. Returns the tickets that it was writing for."""
        with self._lock:
            tickets = [ticket for ticket in self._tickets.values() if ticket.writer is writer]
            for ticket in tickets:
                self._writer_is_gone(ticket)
            return tickets

    # with the lock held

    def _find(self, frame: frames.Pages | frames.Close, writer: Writer) -> Incoming | None:
        ticket = self._tickets.get(frame.request_id)
        known = ticket is not None and ticket.claims.nonce == frame.nonce and ticket.writer is writer
        if ticket is None or not known or frame.epoch != self._epoch:
            self.counts["stray frame"] += 1
            return None
        if not ticket.wanted:
            self.counts["late frame"] += 1
        return ticket

    def _ending(self, ticket: Incoming) -> Ending | None:
        """What is over, now that no thread is at work on it."""
        if ticket.busy:
            return None
        if ticket.stopped and ticket.writer is not None:
            self._writer_is_gone(ticket)
            return Ending.STOPPED
        if ticket.closing is None or not ticket.wanted or ticket.done < ticket.closing.num_frames:
            return None
        ticket.busy += 1  # until `reported`: whatever ends the request later is reported later, too
        ticket.complete = ticket.expected is not None and not ticket.expected.num_missing
        return Ending.COMPLETE if ticket.complete else Ending.INCOMPLETE

    def _writer_is_gone(self, ticket: Incoming) -> None:
        ticket.writer, ticket.writer_gone = None, True
        ticket.released = ticket.revoked
        if ticket.revoked or ticket.complete:
            del self._tickets[ticket.claims.request_id]
