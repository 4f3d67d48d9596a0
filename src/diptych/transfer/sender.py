"""The source's side of a link: one `PushLink` for each target.

A few threads, all blocked in the kernel while there is nothing to do: each connection of the link has one that
takes jobs from a common queue (write a frame's pages, close, abandon), and the first has one more for the
target's answers. The source's pages must not change while jobs about them are queued; the worker guarantees
that by keeping its references to the blocks until `PushAccepted` or `PushStopped`.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence

from diptych.chaos.failpoints import failpoint
from diptych.core.errors import HandshakeError, PeerError, ProtocolError, TransferError
from diptych.core.events import LinkLost, PushAccepted, PushCancelled, PushRejected, PushStopped
from diptych.core.fleet import WorkerId
from diptych.core.kv_layout import TransferPlan
from diptych.core.ports import PageSource
from diptych.core.request import SampledToken
from diptych.core.ticket import TicketClaims
from diptych.transfer import frames
from diptych.transfer.pieces import PlanPieces
from diptych.transfer.pushes import FrameJob, Push
from diptych.transfer.streams import Connection, Endpoint, Identity, Stream, connect, introduce
from diptych.transfer.writers import InlineWriter, PageWriter
from diptych.wire.blocking import STALL_SECONDS

__all__ = ["Identity", "PushLink", "SourceEvent", "WrapWriter"]

log = logging.getLogger(__name__)

SourceEvent = PushAccepted | PushRejected | PushCancelled | LinkLost | PushStopped
WrapWriter = Callable[[PageWriter], PageWriter]

NUM_STREAMS = 2


Job = Callable[[Stream], None]


class PushLink:
    """Pushes pages of `sources` (one for each rank) to one target. Connects on its own threads; `report` is called
    on any of them, or on the caller's.

    `wrap` may put something around the writer (fault injection).
    """

    def __init__(
        self,
        target: WorkerId,
        endpoint: Endpoint,
        identity: Identity,
        sources: Sequence[PageSource],
        report: Callable[[SourceEvent], None],
        wrap: WrapWriter = lambda writer: writer,
        *,
        num_streams: int = NUM_STREAMS,
    ) -> None:
        self.target = target
        self.lost = False
        self._endpoint = endpoint
        self._identity = identity
        self._sources = sources
        self._layout = sources[0].layout
        self._report = report
        self._wrap = wrap
        self._lock = threading.Lock()  # guards what follows, and the pushes' counters
        self._pushes: dict[str, Push] = {}
        self._ended = False
        self._working = 1  # threads that take jobs
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._writer: PageWriter = InlineWriter()
        self._pieces: PlanPieces | None = None  # of the last plan
        self._streams = [Stream() for _ in range(num_streams)]
        self._reader: threading.Thread | None = None
        self._threads = [
            threading.Thread(target=self._lead, args=(self._streams[0],), name=f"push to {target}", daemon=True)
        ]
        self._threads[0].start()

    # called by the worker, from any thread

    def begin(self, request_id: str, claims: TicketClaims) -> None:
        """Ask for the target's leave now, not at the first push: so it hears of an early end, too. Without waiting
        for a thread, if possible: the answer takes as long as planning a small push does."""
        push = self._open(request_id, claims)
        try:
            with self._lock:
                push.begun = push.begun or not self.lost and self._streams[0].send_at_once(_begin(push))
        except OSError as error:
            self._lose(error)
        if not push.begun:
            self._queue(push, lambda push, stream: self._ask(push))

    def push(
        self,
        request_id: str,
        claims: TicketClaims,
        plan: TransferPlan,
        layers: Sequence[int],
        sources: Sequence[PageSource] | Mapping[int, PageSource] | None = None,
    ) -> None:
        """Send some layers' pages of a plan, of all its pairs of ranks, out of `sources` (by default the link's own).
        Small layers that come together share their frames.

        Raises ValueError if the plan is not one from this link's layout to the ticket's, or cuts a unit in two."""
        cut = self._pieces_of(plan, claims)
        push = self._open(request_id, claims)
        from_ranks = self._sources if sources is None else sources
        for pair, transfers, pieces in cut.of_layers(layers):
            for index in range(pieces.num_frames):
                job = FrameJob(transfers, pair, pieces, index, from_ranks)
                with self._lock:
                    push.num_frames += 1
                self._queue(push, functools.partial(self._send_pages, job))

    def close_handoff(self, request_id: str, claims: TicketClaims, token: SampledToken, payload: bytes = b"") -> None:
        """After everything that was pushed for this request: the closing message."""
        push = self._open(request_id, claims)
        self._queue(push, lambda push, stream: self._send_close(push, token, payload))

    def abandon(self, request_id: str, claims: TicketClaims) -> None:
        """Send nothing more for this request; reports PushStopped when nobody reads its blocks any more."""
        push = self._open(request_id, claims)
        self._stop_push(push)
        with self._lock:
            push.stopping = True
        self._queue(push, _nothing)

    def carries(self, claims: TicketClaims) -> bool:
        """Whether this ticket's push began here, and has not ended."""
        with self._lock:
            push = self._pushes.get(claims.request_id)
            return push is not None and push.claims.nonce == claims.nonce

    @property
    def ended(self) -> bool:
        """Whether all threads are done with their last jobs."""
        return self._ended

    def hang_up(self) -> None:
        """Have the threads end, each after its job, and do not wait for that. Requests that are neither over nor
        abandoned hear that the link is lost."""
        self._lose(TransferError("it was ended here"))

    def end(self) -> None:
        """Hang up, and wait for the threads to end."""
        self.hang_up()
        for thread in self._threads:
            thread.join()

    def _pieces_of(self, plan: TransferPlan, claims: TicketClaims) -> PlanPieces:
        """How a plan is cut. All its layers are pushed with it, mostly one after the other."""
        known = self._pieces
        if known is None or known.plan is not plan:
            known = self._pieces = PlanPieces(plan, self._layout, claims)
        return known

    def _open(self, request_id: str, claims: TicketClaims) -> Push:
        """This request's push; a new one at its first job (which on a lost link is lost at once)."""
        with self._lock:
            push = self._pushes.get(request_id)
            if push is not None and push.claims.nonce == claims.nonce:
                return push
            push = self._pushes[request_id] = Push(claims, over=self.lost)
        if push.over:
            self._report(LinkLost(self.target, (request_id,)))
        return push

    @staticmethod
    def _stop_push(push: Push) -> None:
        push.over = True
        push.go.set()

    def _queue(self, push: Push, job: Callable[[Push, Stream], None]) -> None:
        """For whichever thread is free; when they have ended (and the link is lost), here."""

        def for_push(stream: Stream) -> None:
            self._do(push, job, stream)

        with self._lock:
            push.num_jobs += 1
            if not self._ended:
                self._jobs.put(for_push)
                return
        self._guarded(for_push, self._streams[0])

    # the threads of the streams

    def _lead(self, stream: Stream) -> None:
        """The first connection's thread."""
        self._guarded(self._connect, stream)
        self._work(stream)

    def _follow(self, stream: Stream, link: bytes) -> None:
        """A further connection's thread."""
        self._guarded(functools.partial(self._join, link), stream)
        self._work(stream)

    def _work(self, stream: Stream) -> None:
        """Until the link is over. Then each thread hangs up, but only between its jobs: so the target, which sees
        all connections end, can be sure that nothing is being written."""
        while not self.lost and (job := self._jobs.get()) is not None:
            self._guarded(job, stream)
        if stream is self._streams[0] and self._reader is not None and stream.connection is not None:
            stream.connection.end()  # wakes the reader, which may still hold the descriptor
            self._reader.join()
        stream.hang_up()
        with self._lock:
            self._working -= 1
            self._ended = last = self._working == 0
        if last:
            self._writer.close()
        while last and not self._jobs.empty():  # who had not heard of the end yet is told that it is over
            self._guarded(self._jobs.get() or _no_job, stream)

    def _guarded(self, job: Job, stream: Stream) -> None:
        """Whatever breaks a connection ends this link, and nothing else."""
        try:
            job(stream)
        except (OSError, PeerError) as error:
            self._lose(error)
        except Exception as error:  # a bug: still, nobody may wait for a thread that is gone
            log.exception("a job of the data connection to worker %s broke", self.target)
            self._lose(error)

    def _connect(self, stream: Stream) -> None:
        connection = connect(self._endpoint, self._identity)
        try:
            welcome, writer = introduce(connection, self._endpoint, self._identity, self._sources)
            self._writer = self._wrap(writer)
        except BaseException:
            connection.close()
            raise
        stream.connection = connection
        reading = functools.partial(self._read_answers, connection)
        reader = threading.Thread(
            target=self._guarded, args=(reading, stream), name=f"answers of {self.target}", daemon=True
        )
        reader.start()
        self._reader = reader
        for further in self._streams[1:]:
            thread = threading.Thread(
                target=self._follow, args=(further, welcome.link), name=f"push to {self.target}", daemon=True
            )
            with self._lock:  # the thread cannot end before it is counted
                thread.start()
                self._working += 1
            self._threads.append(thread)

    def _join(self, link: bytes, stream: Stream) -> None:
        stream.connection = connect(self._endpoint, self._identity)
        stream.send(frames.Join(link))
        if not isinstance(stream.connection.receive(STALL_SECONDS), frames.Joined):
            raise HandshakeError(f"worker {self.target} did not let a further connection join")

    def _do(self, push: Push, job: Callable[[Push, Stream], None], stream: Stream) -> None:
        """One job of a push. Whoever does its last one says that it has stopped, if it is to stop."""
        try:
            job(push, stream)
        finally:
            with self._lock:
                push.num_jobs -= 1
                stopped = push.stopping and push.num_jobs == 0
                if stopped:
                    push.stopping = False
                    if self._pushes.get(push.claims.request_id) is push:
                        del self._pushes[push.claims.request_id]
            if stopped:
                self._report(PushStopped(push.claims.request_id))
                if push.begun and not self.lost:
                    self._answer(frames.Stopped(push.claims.request_id, push.claims.nonce))

    def _answer(self, message: object) -> None:
        """Say something on the first connection."""
        self._streams[0].send(message)

    def _ask(self, push: Push) -> None:
        """For the target's leave to write, once."""
        with self._lock:
            first, push.begun = not push.begun, True
        if first:
            self._answer(_begin(push))

    def _may_go_on(self, push: Push) -> bool:
        """Before the first write: the target's leave. (A block that it has taken back is somebody else's.) False if
        this push is not wanted any more. On a lost link nothing is: its connections may have ended, and with them the
        right to write."""
        if push.over or self.lost:
            return False
        self._ask(push)
        if not push.go.wait(STALL_SECONDS):
            raise TransferError(f"worker {self.target} does not answer")
        return not (push.over or self.lost)

    def _send_pages(self, job: FrameJob, push: Push, stream: Stream) -> None:
        if push.over:
            return
        self._ask(push)
        pieces = job.pieces.frame(job.index)  # which takes a while, so while the target answers
        if not self._may_go_on(push):
            return
        claims, transfers = push.claims, job.transfers
        digests, payload = stream.write(self._writer, transfers, pieces, job.sources)
        nbytes = sum(map(len, payload))
        if self.lost:
            return
        about = claims.request_id, claims.nonce, claims.epoch
        where = transfers[0].layer, len(transfers), job.pair, pieces[0].first_group
        stream.send(frames.Pages(*about, *where, digests, nbytes), payload)
        failpoint("push.layer_sent")

    def _send_close(self, push: Push, token: SampledToken, payload: bytes) -> None:
        if self._may_go_on(push):
            claims = push.claims
            self._answer(frames.Close(claims.request_id, claims.nonce, claims.epoch, push.num_frames, token, payload))
            failpoint("push.close_sent")

    # the reader thread

    def _read_answers(self, connection: Connection, stream: Stream) -> None:
        while (answer := connection.receive()) is not None:
            self._take(answer)
        raise TransferError(f"worker {self.target} has closed the data connection")

    def _take(self, answer: frames.FromTarget) -> None:
        """Raises ProtocolError for what is no answer about a push."""
        if not isinstance(answer, frames.Go | frames.Accepted | frames.Rejected | frames.Cancel):
            raise ProtocolError(f"worker {self.target} said {type(answer).__name__} out of turn")
        with self._lock:
            push = self._pushes.get(answer.request_id)
            if push is not None and push.claims.nonce != answer.nonce:
                push = None
            if push is not None and isinstance(answer, frames.Accepted):
                del self._pushes[answer.request_id]
        if push is None:
            if isinstance(answer, frames.Cancel):
                stopped = frames.Stopped(answer.request_id, answer.nonce)
                self._jobs.put(lambda stream: self._answer(stopped))
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

    # any thread

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
        for _ in self._streams:
            self._jobs.put(None)  # wakes the threads


def _begin(push: Push) -> frames.Begin:
    return frames.Begin(push.claims.request_id, push.claims.nonce, push.claims.epoch)


def _nothing(push: Push, stream: Stream) -> None:
    """A job that only finds out whether its push has stopped."""


def _no_job(stream: Stream) -> None:
    """In place of a wake-up that nobody needed."""
