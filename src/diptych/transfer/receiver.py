"""The target's side of data connections: takes pages in, verifies them, and says when a hand-off is complete.

A thread accepts connections, and each connection has a thread of its own; all of them block in the
kernel. A peer that breaks the rules costs its own connection and the hand-offs that it was writing for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from diptych.chaos.failpoints import failpoint
from diptych.core.blocks import BlockId
from diptych.core.errors import HandshakeError, PeerError, ProtocolError, TicketError, TransferError
from diptych.core.events import HandoffComplete, HandoffFailed, WriterGone
from diptych.core.fleet import Epoch
from diptych.core.kv_layout import KVMemory
from diptych.core.ticket import TicketClaims
from diptych.transfer import frames
from diptych.transfer.digest import layer_digests
from diptych.transfer.incoming import Incoming, TicketBook
from diptych.wire.blocking import BlockingConnection, accept, listening_socket
from diptych.wire.messages import WIRE_VERSION
from diptych.wire.tls import ListenerTls, listener_tls

log = logging.getLogger(__name__)

TargetEvent = HandoffComplete | HandoffFailed | WriterGone

MAX_CONNECTIONS = 1024  # at once, proven or not; each has a thread
ACCEPT_PAUSE_SECONDS = 1.0  # after a failed accept


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whose pages are taken in. `descriptor` (of a SharedMemory) goes to sources on this machine, which
    then write to the memory themselves."""

    key: bytes = field(repr=False)
    epoch: Epoch
    memory: KVMemory
    model_digest: str
    descriptor: int | None = None


class KVReceiver:
    """Takes pages in for one worker. `report` is called on the receiver's threads, or the caller's."""

    def __init__(self, target: Target, report: Callable[[TargetEvent], None]) -> None:
        self._target = target
        self._report = report
        self.book = TicketBook(target.epoch, target.memory.layout.num_layers)
        self._listeners: list[socket.socket] = []
        self._lock = threading.Lock()  # guards what follows
        self._closing = threading.Event()
        self._peers: set[_Peer] = set()
        self._threads: set[threading.Thread] = set()

    def listen(self, address: str) -> str:
        """Take connections at an address; returns the real one (port 0 takes a free port).

        Over a Unix socket, pages are written to shared memory; over TCP they follow in the frames."""
        sock, real = listening_socket(address)
        tls = listener_tls(address)
        self._listeners.append(sock)
        self._start(lambda: self._accept(sock, tls), f"accept {real}")
        return real

    @property
    def memory(self) -> KVMemory:
        return self._target.memory

    def adopt(self, connection: BlockingConnection[frames.FromSource]) -> None:
        """Serve a data connection from within this process, whose source addresses our memory itself."""
        if not self._start(lambda: self._talk(connection, in_process=True), "data connection"):
            connection.close()

    def expect(self, claims: TicketClaims) -> None:
        """A ticket is out. To be called before anybody can have it."""
        self.book.expect(claims)

    def revoke(self, request_id: str) -> None:
        """Accept nothing more for this request. Reports WriterGone, once, when nobody can write for it."""
        ticket, writer = self.book.revoke(request_id)
        if ticket is None or writer is None:
            self._report(WriterGone(request_id))
        elif isinstance(writer, _Peer):
            writer.tell(frames.Cancel(request_id, ticket.claims.nonce))

    def close(self) -> None:
        """Take no more connections, and end those there are."""
        with self._lock:
            self._closing.set()
            threads = tuple(self._threads)
            for peer in self._peers:
                peer.connection.end()
        for sock in self._listeners:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        for thread in threads:
            thread.join()
        for sock in self._listeners:
            sock.close()

    def _start(self, work: Callable[[], None], name: str) -> bool:
        """Run `work` on a thread of its own. False if there are too many, or no more are wanted."""
        with self._lock:
            self._threads = {thread for thread in self._threads if thread.is_alive()}
            if self._closing.is_set() or len(self._threads) >= MAX_CONNECTIONS:
                return False
            thread = threading.Thread(target=work, name=name, daemon=True)
            thread.start()
            self._threads.add(thread)
            return True

    def _accept(self, listener: socket.socket, tls: ListenerTls | None) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = listener.accept()
            except OSError as error:  # closing, or out of descriptors
                if not self._closing.wait(ACCEPT_PAUSE_SECONDS):
                    log.error("cannot accept data connections: %s", error)
                continue
            if not self._start(functools.partial(self._serve, sock, tls), "data connection"):
                self.book.count("refused connection")
                sock.close()

    def _serve(self, sock: socket.socket, tls: ListenerTls | None) -> None:
        """One connection, from handshake to end."""
        try:
            connection = accept(sock, self._target.key, frames.FromSource, tls)
        except HandshakeError as error:
            self.book.count("refused connection")
            log.warning("%s", error)
            return
        self._talk(connection)

    def _talk(self, connection: BlockingConnection[frames.FromSource], *, in_process: bool = False) -> None:
        peer = _Peer(connection, self._target, self.book, self._report, in_process=in_process)
        with self._lock:
            self._peers.add(peer)
            if self._closing.is_set():
                connection.end()
        try:
            peer.welcome()
            peer.run()
        except (PeerError, OSError) as error:
            self.book.count("broken connection")
            log.warning("data connection of %s ended: %s", peer.name, error)
        finally:
            peer.hang_up()
            with self._lock:
                self._peers.discard(peer)
            peer.close()


class _Peer:
    """One source's connection."""

    def __init__(
        self,
        connection: BlockingConnection[frames.FromSource],
        target: Target,
        book: TicketBook,
        report: Callable[[TargetEvent], None],
        *,
        in_process: bool,
    ) -> None:
        self.connection = connection
        self.name = "a source"
        self._mapped = in_process  # it addresses our memory, so it writes itself and sends no bytes
        self._target = target
        self._book = book
        self._report = report
        self._send_lock = threading.Lock()

    def welcome(self) -> None:
        """Check who it is. Raises HandshakeError if what it serves does not fit."""
        hello = self.connection.receive()
        if not isinstance(hello, frames.PushHello):
            raise HandshakeError("the connection did not begin with a hello")
        self.name = hello.worker_id
        ours = (WIRE_VERSION, self._target.memory.layout.digest, self._target.model_digest)
        theirs = (hello.wire_version, hello.layout_digest, hello.model_digest)
        if ours != theirs:
            raise HandshakeError(f"(wire version, layout, model) are {theirs} there and {ours} here")
        self.tell(frames.PushWelcome(self._target.memory.num_blocks))
        if not self._mapped and self.connection.is_local and self._target.descriptor is not None:
            self._mapped = True
            self.connection.send_descriptor(self._target.descriptor)

    def tell(self, answer: frames.FromTarget) -> None:
        """Answer; a source that is gone is noticed by the thread that reads from it. One that did not take
        an answer whole cannot understand the next, so it gets none: it sees the end, and hangs up."""
        with self._send_lock:
            try:
                self.connection.send(answer)
            except OSError:
                with contextlib.suppress(OSError):
                    self.connection.end_sending()

    def run(self) -> None:
        """Take frames until the source hangs up."""
        while (frame := self.connection.receive()) is not None:
            match frame:
                case frames.Begin():
                    self._begin(frame)
                case frames.Pages():
                    self._pages(frame)
                case frames.Close():
                    self._close(frame)
                case frames.Stopped(request_id, nonce):
                    self._stopped(request_id, nonce)
                case frames.PushHello():
                    raise ProtocolError("a second hello")

    def hang_up(self) -> None:
        """End the connection; a source that writes to our memory has to end it too before it is over."""
        with contextlib.suppress(OSError):
            self.connection.end_sending()
            if self._mapped:
                self.connection.drain()

    def close(self) -> None:
        """The connection is over: whatever it was writing for is not coming."""
        with self._send_lock:  # whoever is about to tell it something finds it closed, not reused
            self.connection.close()
        for ticket in self._book.writer_lost(self):
            self._gone(ticket, "transfer_failed", f"the data connection of {self.name} ended")

    def _begin(self, frame: frames.Begin) -> None:
        try:
            self._book.begin(frame.request_id, frame.nonce, frame.epoch, self)
        except TicketError as error:
            self.tell(frames.Rejected(frame.request_id, frame.nonce, error.code, error.message))
        else:
            self.tell(frames.Go(frame.request_id, frame.nonce))

    def _pages(self, frame: frames.Pages) -> None:
        if not 0 <= frame.nbytes <= len(self._target.memory.layer(0)):
            raise ProtocolError(f"{frame.nbytes} bytes of payload were announced")
        ticket = self._book.find(frame.request_id, frame.nonce, frame.epoch, self)
        if ticket is None:
            self.connection.discard(frame.nbytes)
            return
        try:
            blocks = ticket.target_blocks(frame)
            size = self._target.memory.layout.block_bytes
            if frame.nbytes != (0 if self._mapped else len(blocks) * size):
                raise TransferError(f"{frame.nbytes} bytes of payload for {len(blocks)} pages of {size}")
        except TransferError as error:
            self.connection.discard(frame.nbytes)
            self._fail(ticket, error)
            return
        if frame.nbytes:
            self._receive(frame.layer, blocks)
        if layer_digests(self._target.memory, frame.layer, blocks) == frame.digests:
            self._book.mark(ticket, frame)
            failpoint("receive.pages_verified")
        else:
            self._book.count("corrupt pages")
            self._fail(ticket, TransferError(f"pages of layer {frame.layer} are corrupt", code="kv_corrupt"))

    def _receive(self, layer: int, blocks: Sequence[BlockId]) -> None:
        """Payload straight into the reserved blocks; consecutive ones in one go."""
        memory, size = self._target.memory.layer(layer), self._target.memory.layout.block_bytes
        start = 0
        for end in range(1, len(blocks) + 1):
            if end == len(blocks) or blocks[end] != blocks[end - 1] + 1:
                self.connection.receive_into(memory[blocks[start] * size : (blocks[end - 1] + 1) * size])
                start = end

    def _close(self, frame: frames.Close) -> None:
        ticket = self._book.find(frame.request_id, frame.nonce, frame.epoch, self)
        if ticket is None:
            return
        try:
            complete = self._book.close(ticket)
        except TransferError as error:
            self._fail(ticket, error)
            return
        if complete:
            self._report(HandoffComplete(frame.request_id, frame.token, frame.payload))
            failpoint("receive.complete")
            self.tell(frames.Accepted(frame.request_id, frame.nonce))

    def _stopped(self, request_id: str, nonce: bytes) -> None:
        ticket = self._book.stopped(request_id, nonce, self)
        if ticket is not None:
            self._gone(ticket, "handoff_abandoned", f"{self.name} has given the hand-off up")

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
            self.tell(frames.Rejected(request_id, ticket.claims.nonce, error.code, error.message))
            self._report(HandoffFailed(request_id, error.code, error.message))
