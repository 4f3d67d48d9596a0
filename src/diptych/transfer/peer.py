"""One source's link, as its target sees it: one or more connections, over which pages come in.

Each connection has a thread of its own. Answers go over the first connection. The link is over when the
first of its connections ends, and its writer is gone when the last one has.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from diptych.chaos.failpoints import failpoint
from diptych.core.errors import HandshakeError, PeerError, ProtocolError, TicketError, TransferError
from diptych.core.events import HandoffComplete, HandoffFailed, WriterGone
from diptych.core.fleet import Epoch
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.settings import MAX_STREAMS
from diptych.policy.resharding import incompatibilities
from diptych.transfer import frames
from diptych.transfer.digest import span_digests, unit_digests
from diptych.transfer.expected import Share
from diptych.transfer.incoming import Ending, Incoming, TicketBook
from diptych.transfer.memory import scratch_memory
from diptych.transfer.nixl import NixlTarget
from diptych.wire.blocking import BlockingConnection
from diptych.wire.messages import WIRE_VERSION

log = logging.getLogger(__name__)

TargetEvent = HandoffComplete | HandoffFailed | WriterGone
Connection = BlockingConnection[frames.FromSource]

LINK_BYTES = 16
MAX_CUT = 4096  # of any kind of parallelism, in a layout that a peer announces
MAX_BLOCK_SIZE = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whose pages are taken in: `memories` and `descriptors` (of SharedMemory, or none) are in order of ranks.
    Descriptors go to sources on this machine, which then write to the memory themselves."""

    key: bytes = field(repr=False)
    epoch: Epoch
    memories: tuple[KVMemory, ...]
    model_digest: str
    descriptors: tuple[int, ...] = ()
    nixl: bool = False  # sources that want to may write with NIXL

    @property
    def layout(self) -> KVLayout:
        return self.memories[0].layout

    @property
    def largest_rank(self) -> int:
        """Bytes of the largest memory of any rank."""
        return max(len(memory.buffer) for memory in self.memories)


def refusal(target: Target, hello: frames.PushHello) -> str | None:
    """Why a source is not welcome, or None if it is. Costs no more for a layout that nobody has."""
    layout = hello.layout
    if hello.wire_version != WIRE_VERSION:
        return f"wire version {hello.wire_version} there, {WIRE_VERSION} here"
    if hello.model_digest != target.model_digest:
        return f"model {hello.model_digest[:100]!r} there, {target.model_digest!r} here"
    if hello.nixl and not target.nixl:
        return "NIXL is not offered here"
    cuts = (layout.tensor_parallel, layout.pipeline_parallel, layout.data_parallel, layout.expert_parallel)
    if max(cuts) > MAX_CUT or layout.block_size > MAX_BLOCK_SIZE:
        return f"a KV layout beyond all limits: {layout}"
    return "; ".join(incompatibilities(layout, target.layout)) or None


class Peer:
    """Takes one source's frames. Raises HandshakeError if what it serves does not fit (and tells it so)."""

    def __init__(
        self,
        connection: Connection,
        hello: frames.PushHello,
        target: Target,
        book: TicketBook,
        report: Callable[[TargetEvent], None],
        *,
        in_process: bool,
    ) -> None:
        self.name = hello.worker_id
        self.link = secrets.token_bytes(LINK_BYTES)
        self._layout = hello.layout
        self._target = target
        self._book = book
        self._report = report
        self._first = connection
        self._lock = threading.Lock()  # guards what follows
        self._connections = [connection]
        self._over = False
        self._send_lock = threading.Lock()
        self._wants_nixl = hello.nixl
        self._nixl: NixlTarget | None = None
        self._shares_memory = not in_process and not hello.nixl and connection.is_local and bool(target.descriptors)
        self._mapped = in_process or self._shares_memory or hello.nixl  # it addresses our memory: it writes itself
        if reason := refusal(target, hello):
            self._tell(frames.Refused(reason))
            raise HandshakeError(f"{self.name}: {reason}")

    def _welcome(self) -> None:
        descriptors = self._target.descriptors if self._shares_memory else ()
        num_blocks = self._target.memories[0].num_blocks
        self._tell(frames.PushWelcome(self._target.layout, num_blocks, len(descriptors), self.link))
        for descriptor in descriptors:
            self._first.send_descriptor(descriptor)
        if self._wants_nixl:
            self._nixl = NixlTarget(self.link, self._target.memories)
            self._tell(self._nixl.welcome)

    def join(self, connection: Connection) -> None:
        """A further connection. Raises HandshakeError if it comes too late, or is one too many."""
        with self._lock:
            if self._over or len(self._connections) >= MAX_STREAMS:
                raise HandshakeError(f"{self.name} wants too many connections, or too late")
            self._connections.append(connection)

    def end(self) -> None:
        """It is over: have all threads that wait for this source end, as soon as it cannot write any more."""
        with self._lock:
            self._end()

    def serve(self, connection: Connection) -> bool:
        """Take frames until the source hangs up, or breaks the rules. True if this was its last connection."""
        try:
            if connection is self._first:
                self._welcome()
            else:
                connection.send(frames.Joined())
            stream = _Stream(connection, self._target, mapped=self._mapped, inline=self._wants_nixl or not self._mapped)
            while (frame := connection.receive()) is not None:
                self._take(frame, stream)
        except (PeerError, OSError) as error:
            self._book.count("broken connection")
            log.warning("data connection of %s ended: %s", self.name, error)
        except Exception:  # a bug: still, nobody may wait for a thread that is gone
            self._book.count("broken connection")
            log.exception("data connection of %s broke", self.name)
        return self._hang_up(connection)

    def _hang_up(self, connection: Connection) -> bool:
        """End the link. A source that writes to our memory has to end each connection, too, before that is over."""
        with self._lock:
            self._end()
        if self._mapped:
            with contextlib.suppress(OSError):
                connection.drain()
        with self._lock, self._send_lock:  # whoever is about to tell it something finds it closed, not reused
            self._connections.remove(connection)
            last = not self._connections
            connection.close()
        if last:
            if self._nixl is not None:
                self._nixl.close()
            for ticket in self._book.writer_lost(self):
                self._gone(ticket, "transfer_failed", f"the data connection of {self.name} ended")
        return last

    def _end(self) -> None:
        """With the lock held. A source that writes to our memory ends its connections itself, when it is done."""
        self._over = True
        for connection in self._connections:
            with contextlib.suppress(OSError):
                if self._mapped:
                    connection.end_sending()
                else:
                    connection.end()

    def cancel(self, ticket: Incoming) -> None:
        """The ticket is not wanted any more."""
        self._tell(frames.Cancel(ticket.claims.request_id, ticket.claims.nonce))

    def _tell(self, answer: frames.FromTarget) -> None:
        """Answer; a source that is gone is noticed by the thread that reads from it. One that did not take
        an answer whole cannot understand the next, so it gets none: it sees the end, and hangs up."""
        with self._send_lock:
            try:
                self._first.send(answer)
            except OSError:
                with contextlib.suppress(OSError):
                    self._first.end_sending()

    def _take(self, frame: frames.FromSource, stream: _Stream) -> None:
        match frame:
            case frames.Begin():
                self._begin(frame)
            case frames.Probe(nbytes):
                self._probe(nbytes, stream)
            case frames.Pages():
                self._pages(frame, stream)
            case frames.Close():
                ticket, ending = self._book.close(frame, self)
                self._ended(ticket, ending)
            case frames.Stopped():
                ticket, ending = self._book.stop(frame, self)
                self._ended(ticket, ending)
            case frames.PushHello() | frames.Join():
                raise ProtocolError("a second hello")

    def _begin(self, frame: frames.Begin) -> None:
        try:
            expected = self._book.begin(frame, self, self._layout)
        except TicketError as error:
            self._tell(frames.Rejected(frame.request_id, frame.nonce, error.code, error.message))
        else:
            self._tell(frames.Go(frame.request_id, frame.nonce))
            expected.prepare()

    def _probe(self, nbytes: int, stream: _Stream) -> None:
        if self._nixl is None or not 0 <= nbytes <= frames.SCRATCH_BYTES:
            raise ProtocolError("a probe that nobody asked for")
        stream.connection.receive_into(self._nixl.scratch[:nbytes])
        self._tell(frames.Probed())

    def _pages(self, frame: frames.Pages, stream: _Stream) -> None:
        if not 0 <= frame.nbytes <= self._target.largest_rank:
            raise ProtocolError(f"{frame.nbytes} bytes of payload were announced")
        ticket = self._book.enter(frame, self)
        if ticket is None:
            stream.connection.discard(frame.nbytes)
            return
        try:
            self._verify(ticket, frame, stream)
        finally:
            ending = self._book.leave(ticket)
        self._ended(ticket, ending)

    def _verify(self, ticket: Incoming, frame: frames.Pages, stream: _Stream) -> None:
        """Take a frame's payload in, and see whether it is what was sent."""
        if not ticket.wanted or ticket.expected is None:
            stream.connection.discard(frame.nbytes)
            return
        try:
            share = ticket.expected.share(frame)
            stream.check(frame, share)
        except TransferError as error:
            stream.connection.discard(frame.nbytes)
            self._fail(ticket, error)
            return
        if stream.take(frame, share):
            self._book.mark(ticket, frame)
            failpoint("receive.pages_verified")
        else:
            self._book.count("corrupt pages")
            message = f"pages of layers {frame.layer} to {frame.layers[-1]} are corrupt"
            self._fail(ticket, TransferError(message, code="kv_corrupt"))

    def _ended(self, ticket: Incoming | None, ending: Ending | None) -> None:
        if ticket is None or ending is None:
            return
        request_id, closing = ticket.claims.request_id, ticket.closing
        if ending is Ending.STOPPED:
            self._gone(ticket, "handoff_abandoned", f"{self.name} has given the hand-off up")
        elif ending is Ending.INCOMPLETE:
            try:
                self._fail(ticket, TransferError("the hand-off was closed before all pages had arrived"))
            finally:
                self._ended(ticket, self._book.reported(ticket))
        elif closing is not None:
            try:
                self._report(HandoffComplete(request_id, closing.token, closing.payload))
                failpoint("receive.complete")
            finally:
                self._ended(ticket, self._book.reported(ticket))
            self._tell(frames.Accepted(request_id, closing.nonce))

    def _gone(self, ticket: Incoming, code: str, message: str) -> None:
        """A ticket's writer is gone: the end of a revocation, or the failure that leads to one. (A ticket
        that is revoked only after its writer went is reported by whoever revokes it.)"""
        if ticket.released:
            self._report(WriterGone(ticket.claims.request_id))
        elif self._book.fail(ticket):
            self._report(HandoffFailed(ticket.claims.request_id, code, message))

    def _fail(self, ticket: Incoming, error: TransferError) -> None:
        request_id = ticket.claims.request_id
        if self._book.fail(ticket):
            log.error("hand-off of %s from %s failed: %s", request_id, self.name, error)
            # First the source, so that it hears why, and not of the revocation that follows.
            self._tell(frames.Rejected(request_id, ticket.claims.nonce, error.code, error.message))
            self._report(HandoffFailed(request_id, error.code, error.message))


class _Stream:
    """What one thread needs to take pages in over one connection."""

    def __init__(self, connection: Connection, target: Target, *, mapped: bool, inline: bool) -> None:
        self.connection = connection
        self._memories = target.memories
        self._mapped = mapped  # pages may be in place already
        self._inline = inline  # pages may follow
        self._scratch = memoryview(b"")

    def check(self, frame: frames.Pages, share: Share) -> None:
        """Raises TransferError if the payload has not the size of the pages."""
        nbytes = share.places.nbytes * len(share.layers)
        if not (self._mapped and frame.nbytes == 0 or self._inline and frame.nbytes == nbytes):
            raise TransferError(f"{frame.nbytes} bytes of payload for pages of {nbytes}")

    def take(self, frame: frames.Pages, share: Share) -> bool:
        """Have the pages in memory. False if they are not what was sent."""
        memory, places = self._memories[share.rank], share.places
        layers = [memory.layer(layer) for layer in share.layers]
        if frame.nbytes and not places.are_long:
            digests = [frame.digests_of(layer) for layer in share.layers]
            found = [self._receive_staged(*part, share) for part in zip(layers, digests, strict=True)]  # all of them
            return all(found)
        if frame.nbytes:
            self.connection.receive_scattered([view for layer in layers for view in places.views(layer)])
        return b"".join([self._digests(layer, share) for layer in layers]) == frame.digests

    def _receive_staged(self, layer: memoryview, digests: bytes, share: Share) -> bool:
        """One layer's payload; it goes to its places only if it is what was sent."""
        staged = self._room(share.places.nbytes)
        self.connection.receive_into(staged)
        intact = unit_digests([staged], share.unit_ends) == digests
        if intact:
            share.places.scatter(staged, layer)
        return intact

    def _digests(self, layer: memoryview, share: Share) -> bytes:
        """Of pages that are in place."""
        if share.spans is not None:
            return span_digests(layer, share.spans)
        if share.places.are_long:
            return unit_digests(share.places.views(layer), share.unit_ends)
        staged = self._room(share.places.nbytes)
        share.places.gather(layer, staged)
        return unit_digests([staged], share.unit_ends)

    def _room(self, nbytes: int) -> memoryview:
        if len(self._scratch) < nbytes:
            self._scratch = scratch_memory(nbytes)
        return self._scratch[:nbytes]
