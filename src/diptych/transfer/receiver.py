"""The target's side of data connections: takes pages in, verifies them, and says when a hand-off is complete.

A thread accepts connections, and each connection has a thread of its own; all of them block in the
kernel. A peer that breaks the rules costs its own connections and the hand-offs that it was writing for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import threading
import time
from collections.abc import Callable

from diptych.core.errors import HandshakeError, PeerError
from diptych.core.events import WriterGone
from diptych.core.kv_layout import KVMemory
from diptych.core.ticket import TicketClaims
from diptych.transfer import frames
from diptych.transfer.incoming import TicketBook
from diptych.transfer.peer import Connection, Peer, Target, TargetEvent
from diptych.wire.blocking import accept, end_listening, listening_socket
from diptych.wire.tls import ListenerTls, listener_tls

__all__ = ["KVReceiver", "Target", "TargetEvent"]

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024  # at once, proven or not; each has a thread
ACCEPT_PAUSE_SECONDS = 1.0  # after a failed accept
CLOSE_SECONDS = 10.0  # for sources to let go of our memory


class KVReceiver:
    """Takes pages in for one worker. `report` is called on the receiver's threads, or the caller's."""

    def __init__(self, target: Target, report: Callable[[TargetEvent], None]) -> None:
        self._target = target
        self._report = report
        self.book = TicketBook(target.epoch)
        self._listeners: list[socket.socket] = []
        self._lock = threading.Lock()  # guards what follows
        self._closing = threading.Event()
        self._peers: dict[bytes, Peer] = {}
        self._strangers: set[Connection] = set()  # that have not said yet what they want
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
    def memories(self) -> tuple[KVMemory, ...]:
        return self._target.memories

    def adopt(self, connection: Connection) -> None:
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
        elif isinstance(writer, Peer):
            writer.cancel(ticket)

    def close(self) -> bool:
        """Take no more connections, and end those there are. False if a source on this machine has not let go of our
        memory after CLOSE_SECONDS (it may be frozen): it could write there once more."""
        with self._lock:
            self._closing.set()
            threads, peers = tuple(self._threads), tuple(self._peers.values())
            for connection in self._strangers:
                connection.end()
        for peer in peers:
            peer.end()
        for sock in self._listeners:
            with contextlib.suppress(OSError):
                end_listening(sock)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        for sock in self._listeners:
            sock.close()
        return not any(thread.is_alive() for thread in threads)

    def _start(self, work: Callable[[], None], name: str) -> bool:
        """Run `work` on a thread of its own. False if there are too many, or no more can be had or are wanted."""
        with self._lock:
            self._threads = {thread for thread in self._threads if thread.is_alive()}
            if self._closing.is_set() or len(self._threads) >= MAX_CONNECTIONS:
                return False
            thread = threading.Thread(target=work, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more; those who run shall go on
                log.error("no thread for a data connection: %s", error)
                return False
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

    def _talk(self, connection: Connection, *, in_process: bool = False) -> None:
        with self._lock:
            self._strangers.add(connection)
            if self._closing.is_set():
                connection.end()
        try:
            peer = self._meet(connection, in_process=in_process)
        except (PeerError, OSError) as error:
            self.book.count("broken connection")
            log.warning("a data connection was refused: %s", error)
            connection.close()
            return
        if peer.serve(connection):
            with self._lock:
                del self._peers[peer.link]

    def _meet(self, connection: Connection, *, in_process: bool) -> Peer:
        """Whose connection it is: a new source's, or a further one of a link. Raises HandshakeError if it is
        nobody's, or not welcome."""
        try:
            first = connection.receive()
        finally:
            with self._lock:
                self._strangers.discard(connection)
        if isinstance(first, frames.Join):
            with self._lock:
                known = self._peers.get(first.link)
            if known is None:
                raise HandshakeError("it wants to join a link that is not here")
            known.join(connection)
            return known
        if not isinstance(first, frames.PushHello):
            raise HandshakeError("the connection did not begin with a hello")
        peer = Peer(connection, first, self._target, self.book, self._report, in_process=in_process)
        with self._lock:
            self._peers[peer.link] = peer
            closing = self._closing.is_set()
        if closing:
            peer.end()
        return peer
