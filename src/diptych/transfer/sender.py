"""The source's side of a data connection: one `PushLink` for each target.

Two threads, both blocked in the kernel while there is nothing to do: the sender takes jobs from a queue
(write pages, close, abandon) and the reader takes the target's answers. The source's pages must not
change while jobs about them are queued; the worker guarantees that by keeping its references to the
blocks until `PushAccepted` or `PushStopped`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from diptych.chaos.failpoints import failpoint
from diptych.core.errors import HandshakeError, PeerError, TransferError
from diptych.core.events import LinkLost, PushAccepted, PushCancelled, PushRejected, PushStopped
from diptych.core.fleet import KVEndpoint, WorkerId
from diptych.core.kv_layout import KVMemory, LayerTransfer, TransferPlan
from diptych.core.ports import PageSource, PageWriter
from diptych.core.request import SampledToken
from diptych.core.ticket import TicketClaims
from diptych.transfer import frames
from diptych.transfer.digest import layer_digests
from diptych.transfer.local import LocalEndpoint
from diptych.transfer.memory import map_memory
from diptych.transfer.pieces import Piece, Ranges, frames_of
from diptych.transfer.writers import InlineWriter, MappedWriter
from diptych.wire.blocking import STALL_SECONDS, BlockingConnection, dial
from diptych.wire.messages import WIRE_VERSION

log = logging.getLogger(__name__)


SourceEvent = PushAccepted | PushRejected | PushCancelled | LinkLost | PushStopped
Connection = BlockingConnection[frames.FromTarget]
WrapWriter = Callable[[PageWriter], PageWriter]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who pushes: what a source says of itself and proves."""

    key: bytes = field(repr=False)
    worker_id: WorkerId
    model_digest: str


@dataclass(slots=True, eq=False)
class _Push:
    """One request's pages on their way. `over` stops everything that is still queued for it."""

    claims: TicketClaims
    go: threading.Event = field(default_factory=threading.Event)
    begun: bool = False
    over: bool = False


Job = Callable[[], None]


class PushLink:
    """Pushes pages of `source` to one target. Connects on its own thread; `report` is called on either.

    `wrap` may put something around the writer (fault injection).
    """

    def __init__(
        self,
        target: WorkerId,
        endpoint: KVEndpoint | LocalEndpoint,
        identity: Identity,
        source: KVMemory,
        report: Callable[[SourceEvent], None],
        wrap: WrapWriter = lambda writer: writer,
    ) -> None:
        self.target = target
        self.lost = False
        self._ended = False
        self._endpoint = endpoint
        self._identity = identity
        self._source = source
        self._report = report
        self._wrap = wrap
        self._lock = threading.Lock()
        self._pushes: dict[str, _Push] = {}
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._connection: Connection | None = None
        self._writer: PageWriter = InlineWriter()
        self._cut: tuple[Ranges, list[list[Piece]]] = ((), [])
        self._sender = threading.Thread(target=self._send_jobs, name=f"push to {target}", daemon=True)
        self._reader: threading.Thread | None = None
        self._sender.start()

    # called by the worker, from any thread

    def begin(self, request_id: str, claims: TicketClaims) -> None:
        """Ask for the target's leave now, not at the first push: so it hears of an early end, too."""
        push = self._open(request_id, claims)
        self._queue(lambda: self._begin(push))

    def push(
        self, request_id: str, claims: TicketClaims, plan: TransferPlan, layer: int, source: PageSource | None = None
    ) -> None:
        """Send one layer's pages of a plan, out of `source` (by default the link's own)."""
        push = self._open(request_id, claims)
        pages = self._source if source is None else source
        self._queue(lambda: self._send_pages(push, plan, layer, pages))

    def close_handoff(self, request_id: str, claims: TicketClaims, token: SampledToken, payload: bytes = b"") -> None:
        """After everything that was pushed for this request: the closing message."""
        push = self._open(request_id, claims)
        self._queue(lambda: self._send_close(push, token, payload))

    def abandon(self, request_id: str, claims: TicketClaims) -> None:
        """Send nothing more for this request; reports PushStopped when nobody reads its blocks any more."""
        push = self._open(request_id, claims)
        self._stop_push(push)
        self._queue(lambda: self._send_stopped(push))

    def end(self) -> None:
        """Finish what is queued for abandoned requests, hang up, end the threads. Other requests hear
        that the link is lost."""
        self._lose(TransferError("it was ended here"))
        self._jobs.put(None)
        self._sender.join()

    def _queue(self, job: Job) -> None:
        """For the sender thread; when that has ended (and the link is lost), here."""
        with self._lock:
            if not self._ended:
                self._jobs.put(job)
                return
        self._guarded(job)

    def _open(self, request_id: str, claims: TicketClaims) -> _Push:
        """This request's push; a new one at its first job (which on a lost link is lost at once)."""
        with self._lock:
            push = self._pushes.get(request_id)
            if push is not None and push.claims.nonce == claims.nonce:
                return push
            push = self._pushes[request_id] = _Push(claims, over=self.lost)
        if push.over:
            self._report(LinkLost(self.target, (request_id,)))
        return push

    @staticmethod
    def _stop_push(push: _Push) -> None:
        push.over = True
        push.go.set()

    # the sender thread

    def _send_jobs(self) -> None:
        self._guarded(self._connect)
        while (job := self._jobs.get()) is not None:
            self._guarded(job)
        self._hang_up()
        with self._lock:
            self._ended = True
        while not self._jobs.empty():  # who had not heard of the end yet is told that it is over
            self._guarded(self._jobs.get() or _nothing)

    def _guarded(self, job: Job) -> None:
        """Whatever breaks the connection ends this link, and nothing else."""
        try:
            job()
        except (OSError, PeerError) as error:
            self._lose(error)
        except Exception as error:  # a bug: still, nobody may wait for a thread that is gone
            log.exception("a job of the data connection to worker %s broke", self.target)
            self._lose(error)
        if self.lost:
            self._hang_up()

    def _connect(self) -> None:
        connection: Connection = (
            self._endpoint.dial()
            if isinstance(self._endpoint, LocalEndpoint)
            else dial(self._endpoint.address, self._identity.key, frames.FromTarget)
        )
        try:
            self._writer = self._wrap(self._introduce(connection))
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._reader = threading.Thread(
            target=self._read_answers, args=(connection,), name=f"answers of {self.target}", daemon=True
        )
        self._reader.start()

    def _introduce(self, connection: Connection) -> PageWriter:
        """Say who we are, and learn how to write."""
        layout = self._source.layout
        connection.send(
            frames.PushHello(WIRE_VERSION, self._identity.worker_id, layout.digest, self._identity.model_digest)
        )
        welcome = connection.receive(STALL_SECONDS)
        if not isinstance(welcome, frames.PushWelcome):
            raise HandshakeError(f"worker {self.target} refused the data connection")
        if isinstance(self._endpoint, LocalEndpoint):
            return MappedWriter(self._endpoint.memory)
        if self._endpoint.transport != "shm":
            return InlineWriter()
        return MappedWriter(map_memory(connection.receive_descriptor(), layout, welcome.num_blocks))

    def _connected(self) -> Connection:
        if self._connection is None or self.lost:
            raise TransferError(f"no data connection to worker {self.target}")
        return self._connection

    def _begin(self, push: _Push) -> None:
        """Before the first write: the target's leave. (A block that it has taken back is somebody else's.)"""
        if push.begun:
            return
        claims = push.claims
        push.begun = True
        self._connected().send(frames.Begin(claims.request_id, claims.nonce, claims.epoch))
        if not push.go.wait(STALL_SECONDS):
            raise TransferError(f"worker {self.target} does not answer")

    def _send_pages(self, push: _Push, plan: TransferPlan, layer: int, source: PageSource) -> None:
        if push.over:
            return
        self._begin(push)
        if push.over:
            return
        claims = push.claims
        for transfer in plan.layers:
            if transfer.layer != layer:
                continue
            first_block = plan.first_block
            for pieces in self._frames(transfer.ranges):
                digests, payload = self._write(transfer, pieces, source)
                nbytes = sum(len(buffer) for buffer in payload)
                pages = frames.Pages(claims.request_id, claims.nonce, claims.epoch, layer, first_block, digests, nbytes)
                self._connected().send(pages, payload)
                first_block += pages.num_blocks
            failpoint("push.layer_sent")

    def _frames(self, ranges: Ranges) -> list[list[Piece]]:
        """What goes into each frame. All layers of a plan share their ranges, which are cut once."""
        if self._cut[0] is not ranges:
            self._cut = ranges, frames_of(ranges, self._source.layout.block_bytes)
        return self._cut[1]

    def _write(
        self, transfer: LayerTransfer, pieces: list[Piece], source: PageSource
    ) -> tuple[bytes, list[memoryview]]:
        """Move pages; returns the digest of each, in logical order, and the bytes for the frame itself."""
        digests: list[bytes] = []
        payload: list[memoryview] = []
        for piece in pieces:
            payload += self._writer.write(replace(transfer, ranges=piece.ranges), source)
            digests.append(layer_digests(source, transfer.layer, piece.blocks))
        return b"".join(digests), payload

    def _send_close(self, push: _Push, token: SampledToken, payload: bytes) -> None:
        if push.over:
            return
        self._begin(push)
        if not push.over:
            claims = push.claims
            self._connected().send(frames.Close(claims.request_id, claims.nonce, claims.epoch, token, payload))
            failpoint("push.close_sent")

    def _send_stopped(self, push: _Push) -> None:
        claims = push.claims
        with self._lock:
            if self._pushes.get(claims.request_id) is push:
                del self._pushes[claims.request_id]
        self._report(PushStopped(claims.request_id))
        if push.begun and not self.lost:
            self._connected().send(frames.Stopped(claims.request_id, claims.nonce))

    def _hang_up(self) -> None:
        """Only the sender closes the connection, and it does so between jobs: so the target, which sees
        the connection end, can be sure that nothing is being written."""
        connection, self._connection = self._connection, None
        if connection is not None and self._reader is not None:
            connection.end()  # wakes the reader, which may still hold the descriptor
            self._reader.join()
            connection.close()

    # the reader thread

    def _read_answers(self, connection: Connection) -> None:
        try:
            while (answer := connection.receive()) is not None:
                self._take(answer)
            error: Exception = TransferError(f"worker {self.target} has closed the data connection")
        except (OSError, PeerError) as broken:
            error = broken
        self._lose(error)
        self._jobs.put(_nothing)  # wakes the sender, which hangs up

    def _take(self, answer: frames.FromTarget) -> None:
        if isinstance(answer, frames.PushWelcome):
            return
        with self._lock:
            push = self._pushes.get(answer.request_id)
            if push is not None and push.claims.nonce != answer.nonce:
                push = None
            if push is not None and isinstance(answer, frames.Accepted):
                del self._pushes[answer.request_id]
        if push is None:
            if isinstance(answer, frames.Cancel):
                stopped = frames.Stopped(answer.request_id, answer.nonce)
                self._jobs.put(lambda: self._connected().send(stopped))
        elif isinstance(answer, frames.Go):
            push.go.set()
        elif isinstance(answer, frames.Accepted):
            failpoint("push.accepted")
            self._report(PushAccepted(answer.request_id))
        elif isinstance(answer, frames.Rejected):
            self._stop_push(push)
            self._report(PushRejected(answer.request_id, answer.code, answer.message))
        else:
            self._stop_push(push)
            self._report(PushCancelled(answer.request_id))

    # either thread

    def _lose(self, error: Exception) -> None:
        with self._lock:
            if self.lost:
                return
            self.lost = True
            open_pushes = {request_id: push for request_id, push in self._pushes.items() if not push.over}
        level = logging.WARNING if open_pushes else logging.INFO
        log.log(level, "data connection to worker %s is over: %s", self.target, error)
        for push in open_pushes.values():
            self._stop_push(push)
        if open_pushes:
            self._report(LinkLost(self.target, tuple(open_pushes)))


def _nothing() -> None:
    """A job that only wakes the sender."""
