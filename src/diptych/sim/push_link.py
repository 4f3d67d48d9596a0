"""The source's side of a data connection, step by step as in `transfer.sender`.

A job is a generator: it yields seconds that it takes, or a push whose leave (`Go`) it waits for. Jobs run one
after the other, as they do on the sender's thread; answers come in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diptych.core.events import LinkLost, PushAccepted, PushCancelled, PushRejected, PushStopped
from diptych.core.kv_layout import LayerTransfer, TransferPlan
from diptych.core.request import SampledToken
from diptych.core.ticket import TicketClaims
from diptych.sim import frames
from diptych.sim.network import End, Pipe

if TYPE_CHECKING:
    from diptych.sim.life import Life
    from diptych.sim.receiver import Peer

STALL_SECONDS = 30.0  # as in wire.blocking
HANDSHAKE_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class Push:
    """One request's pages on their way. `over` stops everything that is still queued for it."""

    claims: TicketClaims
    go: bool = False
    begun: bool = False
    over: bool = False
    num_frames: int = 0  # of pages, sent


Job = Generator["float | Push", None, None]
Transfers = tuple[LayerTransfer, ...]
Reading = int  # names a set of blocks that are being read


class LinkBroken(Exception):
    """There is no connection, or no longer."""


class PushLink:
    """Pushes one life's pages to one life of another worker."""

    def __init__(self, source: Life, target: Life) -> None:
        self.lost = False
        self.hung_up = False
        self.pushes: dict[str, Push] = {}
        self.target = target
        self._source = source
        self._mapped = source.spec.host == target.spec.host
        self._peer: Peer | None = None
        self._pipe: Pipe | None = None
        self._jobs: deque[Job] = deque([self._connect()])
        self._job: Job | None = None
        self._waits_for: Push | None = None
        self._work()

    # what the worker asks for

    def push(self, request_id: str, claims: TicketClaims, plan: TransferPlan, layer: int) -> None:
        """Send one layer's pages of a plan."""
        transfers = tuple(transfer for transfer in plan.layers if transfer.layer == layer)
        blocks = range(plan.first_block, plan.first_block + plan.num_blocks)
        reading = self._source.begin_reading(request_id, transfers)
        self._queue(self._send_pages(self._open(request_id, claims), transfers, blocks, reading))

    def close_handoff(self, request_id: str, claims: TicketClaims, token: SampledToken) -> None:
        """After everything that was pushed for this request: the closing message."""
        self._queue(self._send_close(self._open(request_id, claims), token))

    def abandon(self, request_id: str, claims: TicketClaims) -> None:
        """Send nothing more for this request; reports PushStopped when nobody reads its blocks any more."""
        push = self._open(request_id, claims)
        self._stop(push)
        self._queue(self._send_stopped(push))

    def end(self) -> None:
        """Finish what is queued for abandoned requests, and hang up."""
        self._lose("it was ended here")

    @property
    def at_rest(self) -> bool:
        """Hung up, with nothing left to do."""
        return self.hung_up and self._job is None and not self._jobs

    # the sender's thread

    def _queue(self, job: Job) -> None:
        self._jobs.append(job)
        self._work()

    def _work(self) -> None:
        if self._job is None and self._jobs:
            self._job = self._jobs.popleft()
            self._sleep(self._source.world.rng.random() * self._source.world.scenario.latency)

    def _sleep(self, seconds: float) -> None:
        source = self._source
        source.world.kernel.after(seconds, lambda: source.process.run(self._advance))

    def _advance(self) -> None:
        """Go on with the job at hand until it has to wait."""
        if self._job is None:
            return
        try:
            wait = next(self._job, None)
        except LinkBroken as error:
            wait = None
            self._lose(str(error))
        if isinstance(wait, Push):
            self._waits_for = wait
            source = self._source
            source.world.kernel.after(STALL_SECONDS, lambda: source.process.run(lambda: self._wake(wait)))
        elif wait is not None:
            self._sleep(wait)
        else:
            self._job = None
            if self.lost:
                self._hang_up()
            self._work()
            self._source.check_closed()

    def _wake(self, push: Push) -> None:
        """Leave has come, or will not."""
        if self._waits_for is push:
            self._waits_for = None
            self._advance()

    def _connect(self) -> Job:
        world, source, target = self._source.world, self._source, self.target
        there, back = (source.worker_id, target.worker_id), (target.worker_id, source.worker_id)
        yield world.network.latency(there) + world.network.latency(back)
        waited = 0.0
        while not self.lost and (world.network.is_cut(there) or world.network.is_cut(back) or target.process.frozen):
            if waited >= HANDSHAKE_SECONDS:
                raise LinkBroken("it cannot be reached")
            waited += 1.0
            yield 1.0
        if self.lost or not target.accepts:
            raise LinkBroken("nobody listens there")
        answers = world.network.pipe(*back, lambda answer: source.process.run(lambda: self._take(answer)), data=True)
        peer = self._peer = target.receiver.adopt(source, answers, mapped=self._mapped)
        self._pipe = world.network.pipe(
            *there, lambda frame: target.process.run(lambda: peer.receive(frame)), data=True
        )
        source.pipes_out.append(self._pipe)
        source.pipes_in.append(answers)
        target.pipes_out.append(answers)
        target.pipes_in.append(self._pipe)

    def _send(self, frame: object) -> None:
        if self._pipe is None or self.lost:
            raise LinkBroken("there is no data connection")
        self._pipe.send(frame)

    def _begin(self, push: Push) -> Job:
        """Before the first write: the target's leave."""
        if push.begun:
            return
        claims = push.claims
        push.begun = True
        self._send(frames.Begin(claims.request_id, claims.nonce, claims.epoch))
        yield push
        if not push.go and not push.over:
            raise LinkBroken("it does not answer")

    def _send_pages(self, push: Push, transfers: Transfers, blocks: range, reading: Reading) -> Job:
        source = self._source
        try:
            if push.over:
                return
            yield from self._begin(push)
            if push.over:
                return
            # Copying takes a while, and nobody can stop it in between.
            yield source.world.rng.random() * source.world.scenario.latency
            claims, layer = push.claims, transfers[0].layer
            content, digest = source.read_pages(transfers)
            if self._mapped and self._peer is not None:
                self.target.receiver.written_by(self._peer, claims, transfers, content)
            payload = None if self._mapped else content
            push.num_frames += 1
            self._send(
                frames.Pages(claims.request_id, claims.nonce, claims.epoch, layer, blocks, transfers, digest, payload)
            )
        finally:
            source.end_reading(reading)

    def _send_close(self, push: Push, token: SampledToken) -> Job:
        if push.over:
            return
        yield from self._begin(push)
        if not push.over:
            claims = push.claims
            self._send(frames.Close(claims.request_id, claims.nonce, claims.epoch, push.num_frames, token))

    def _send_stopped(self, push: Push) -> Job:
        claims = push.claims
        if self.pushes.get(claims.request_id) is push:
            del self.pushes[claims.request_id]
        self._source.post(PushStopped(claims.request_id))
        if push.begun and not self.lost:
            self._send(frames.Stopped(claims.request_id, claims.nonce))
        yield 0.0

    def _answer_cancel(self, answer: frames.Cancel) -> Job:
        self._send(frames.Stopped(answer.request_id, answer.nonce))
        yield 0.0

    def _nothing(self) -> Job:
        """Wakes the sender, which hangs up."""
        yield 0.0

    def _hang_up(self) -> None:
        self.hung_up = True
        if self._pipe is not None:
            self._pipe.end()
            self._pipe = None

    # the reader's thread

    def _take(self, answer: object) -> None:
        if isinstance(answer, End):
            self._lose("it has hung up")
            return
        assert isinstance(answer, frames.Go | frames.Accepted | frames.Rejected | frames.Cancel)
        push = self.pushes.get(answer.request_id)
        if push is not None and push.claims.nonce != answer.nonce:
            push = None
        if push is None:
            if isinstance(answer, frames.Cancel):
                self._queue(self._answer_cancel(answer))
        elif isinstance(answer, frames.Go):
            push.go = True
            self._wake(push)
        elif isinstance(answer, frames.Accepted):
            del self.pushes[answer.request_id]
            self._source.post(PushAccepted(answer.request_id))
        elif isinstance(answer, frames.Rejected):
            self._stop(push)
            self._source.post(PushRejected(answer.request_id, answer.code, answer.message))
        else:
            self._stop(push)
            self._source.post(PushCancelled(answer.request_id))

    # either

    def _open(self, request_id: str, claims: TicketClaims) -> Push:
        push = self.pushes.get(request_id)
        if push is not None and push.claims.nonce == claims.nonce:
            return push
        push = self.pushes[request_id] = Push(claims, over=self.lost)
        if push.over:
            self._source.post(LinkLost(self.target.worker_id, (request_id,)))
        return push

    def _stop(self, push: Push) -> None:
        push.over = True
        if self._waits_for is push:
            self._source.world.kernel.after(0.0, lambda: self._source.process.run(lambda: self._wake(push)))

    def _lose(self, why: str) -> None:
        if self.lost:
            return
        self.lost = True
        open_pushes = {request_id: push for request_id, push in self.pushes.items() if not push.over}
        if open_pushes:
            names = ", ".join(open_pushes)
            self._source.tell("loses its data connection to {} ({}) with {}", self.target.name, why, names)
        for push in open_pushes.values():
            self._stop(push)
        if open_pushes:
            self._source.post(LinkLost(self.target.worker_id, tuple(open_pushes)))
        self._queue(self._nothing())
