"""The router's brain: the life of every request, from submission to its last token.

    submitted ── local ──────────────────────────────► StartLocal ──► first token ──► tokens ──► end
        └────── split ► ReserveBlocks ─ ticket ► StartPrefill ─┬─ first token (from the prefill worker)
                                                               └─ tokens 2... (from the decode worker)

Between submission and the first order to a worker lies the fair queue (`policy.admission`): a request waits there
until the fleet has room and it is its turn. Without competition that is at once.

The log of record is kept here. Tokens come from two workers over two connections, so they are put in
order by their index; a duplicate is dropped. Whatever ends a request on one worker ends it on the other.

A worker or hand-off that fails does not end the request: the log so far is continued elsewhere, by a new
attempt. Workers know each attempt by an id of its own, so what an older one still sends means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from diptych.core.actions import (
    AbortOn,
    Deliver,
    DeliverFailure,
    ReserveBlocks,
    RouterAction,
    StartLocal,
    StartPrefill,
)
from diptych.core.blocks import BlockHash, block_hashes
from diptych.core.errors import OverloadedError, ServingError
from diptych.core.events import (
    BlocksCached,
    FirstTokenMade,
    RequestCancelled,
    RequestFailed,
    RequestSubmitted,
    RouterEvent,
    TicketGranted,
    TokensMade,
    WorkerGone,
    WorkerUpdated,
)
from diptych.core.fleet import NOWHERE, Route, RouterStats, WorkerId, WorkerView
from diptych.core.request import Preference, Request, TokenOutput
from diptych.core.timeline import Timeline
from diptych.policy.admission import Admission, AdmissionLimits
from diptych.policy.prefix_index import PrefixIndex
from diptych.policy.recovery import FAILED_HANDOFFS, LOST_WORKER, SuspectPairs, preference_after
from diptych.policy.routing import Demand, Routing, WorkerLoad
from diptych.policy.saturation import Pending, Room


@dataclass(slots=True)
class LiveRequest:
    """The log of record of one stream, and what the client is told about it."""

    request: Request
    route: Route
    timeline: Timeline
    prefill_tokens: int = 0  # credited to the worker that prefills, until the first token
    output_token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    early: dict[int, TokenOutput] = field(default_factory=dict)  # tokens ahead of a missing one
    attempt: int = 1
    num_resumed: int = 0  # tokens of the log that this attempt began with

    @property
    def attempt_id(self) -> str:
        """What workers call this attempt."""
        return self.request.request_id if self.attempt == 1 else f"{self.request.request_id}~{self.attempt}"

    @property
    def prefiller(self) -> WorkerId:
        return self.route.prefill or self.route.decode

    @property
    def handed_over(self) -> bool:
        """The decode worker has gone on from the first token, and that has arrived: the prefill worker's part is
        done. (Later tokens may overtake the first one, which is lost if its sender dies before it is sent.)"""
        made_here = len(self.output_token_ids) - self.num_resumed
        return made_here > 1 or (made_here == 1 and bool(self.early))

    def needs(self, worker_id: WorkerId) -> bool:
        """Whether it cannot go on without this worker."""
        return worker_id in self.workers and not (worker_id == self.route.prefill and self.handed_over)

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """Everybody who may hold blocks for it."""
        if self.route is NOWHERE:
            return ()
        return (self.route.decode,) if self.route.prefill is None else (self.route.decode, self.route.prefill)


@dataclass(frozen=True, slots=True)
class _Place:
    """A route, and how many tokens there are to compute on its prefilling worker."""

    route: Route
    prefill_tokens: int


class RouterPolicy:
    """The decisions of the router."""

    def __init__(
        self, routing: Routing, limits: AdmissionLimits | None = None, index: PrefixIndex | None = None
    ) -> None:
        self.workers: dict[WorkerId, WorkerView] = {}
        self.live: dict[str, LiveRequest] = {}
        self.ignored = 0  # messages about requests that are over, and tokens that came twice
        self.retried = 0  # attempts after the first
        self._attempts: dict[str, LiveRequest] = {}  # by attempt_id
        self._suspects = SuspectPairs()
        self._routing = routing
        self._limits = limits or AdmissionLimits()
        self.admission = Admission(self._limits)
        self._index = index or PrefixIndex(capacity=1 << 20)

    def handle(self, event: RouterEvent, now: float) -> list[RouterAction]:
        """Take one event; returns what to do, in order."""
        actions = self._on_event(event, now)
        if self.admission.queue and _may_make_room(event):
            actions += self._start_waiting(now)
        return actions

    def _on_event(self, event: RouterEvent, now: float) -> list[RouterAction]:
        match event:
            case RequestSubmitted(request):
                return self._submit(request, now)
            case RequestCancelled(request_id):
                return self._end(request_id)
            case TicketGranted(worker_id, request_id, ticket, _):
                return self._granted(worker_id, request_id, ticket)
            case FirstTokenMade():
                return self._first_token(event, now)
            case TokensMade(worker_id, outputs):
                return [action for output in outputs for action in self._token(worker_id, output, now)]
            case RequestFailed():
                return self._failed(event, now)
            case WorkerUpdated(view):
                self.workers[view.worker_id] = view
                return []
            case WorkerGone(worker_id):
                return self._worker_gone(worker_id, now)
            case BlocksCached(worker_id, stored, evicted):
                self._index.store(worker_id, stored)
                self._index.evict(worker_id, evicted)
                return []

    # beginning

    def check(self, tenant: str) -> OverloadedError | None:
        """Why no request of this tenant, however small, would come in now; None if one might."""
        return self.admission.refusal(tenant, 0, None, self._room())

    def _submit(self, request: Request, now: float) -> list[RouterAction]:
        error = self.admission.refusal(request.tenant, len(request.prompt_token_ids), request.timeout, self._room())
        if error is not None:
            return [DeliverFailure(request.request_id, error)]
        self.live[request.request_id] = LiveRequest(request, NOWHERE, Timeline(arrived=now))
        self.admission.enter(request, now)
        return self._start_waiting(now)

    def _start_waiting(self, now: float) -> list[RouterAction]:
        """Begin what there is room for, in fair order; give up what has waited for too long."""
        actions: list[RouterAction] = []
        for request_id, error in self.admission.expired(now):
            actions += [*self._end(request_id), DeliverFailure(request_id, error)]
        while (next_id := self.admission.next(room := self._room())) is not None:
            live = self.live[next_id]
            prompt = live.request.prompt_token_ids
            place = self._place(prompt, live.request, live.request.prefer, now)
            if place is None or not room.fits(place.route, len(prompt)):
                break  # where it is served best they are busy: that is sooner done than what is second best
            self.admission.start(next_id, now)
            live.timeline.dispatched, live.timeline.split = now, place.route.prefill is not None
            actions += self._start(live, place)
        return actions

    def _room(self) -> Room:
        pending = (
            Pending(live.prefiller, live.route.decode, live.prefill_tokens)
            for live in self._attempts.values()
            if live.prefill_tokens
        )
        return Room(self.workers.values(), pending, self._limits.room)

    def _place(self, log: Sequence[int], request: Request, prefer: Preference, now: float) -> _Place | None:
        """Where a log is continued best; None if no worker is ready."""
        demand = Demand(len(log), self._cached_tokens(log, request.cache_salt), prefer)
        choice = self._routing.choose(demand, list(self.workers.values()), self.loads(), self._suspects.at(now))
        if choice is None:
            return None
        return _Place(choice.route, demand.uncached(choice.route.prefill or choice.route.decode))

    def _start(self, live: LiveRequest, place: _Place) -> list[RouterAction]:
        """Have the place's workers begin with the log as it is."""
        live.route, live.prefill_tokens = place.route, place.prefill_tokens
        self._attempts[live.attempt_id] = live
        request, outputs = replace(live.request, request_id=live.attempt_id), tuple(live.output_token_ids)
        if live.route.prefill is None:
            return [StartLocal(live.route.decode, request, outputs)]
        return [ReserveBlocks(live.route.decode, request, outputs)]

    def _cached_tokens(self, log: Sequence[int], salt: str) -> dict[WorkerId, int]:
        """Leading tokens of a log that each worker has in its prefix cache."""
        sizes = {worker.block_size for worker in self.workers.values()}
        cached: dict[WorkerId, int] = {}
        for size in sizes:
            hashes = _block_hashes(tuple(log), size, salt)
            for worker_id, blocks in self._index.match(hashes).items():
                if worker_id in self.workers and self.workers[worker_id].block_size == size:
                    cached[worker_id] = blocks * size
        return cached

    def loads(self) -> dict[WorkerId, WorkerLoad]:
        """What each worker has been given and not finished."""
        tokens: dict[WorkerId, int] = {}
        sequences: dict[WorkerId, int] = {}
        for live in self._attempts.values():
            tokens[live.prefiller] = tokens.get(live.prefiller, 0) + live.prefill_tokens
            sequences[live.route.decode] = sequences.get(live.route.decode, 0) + 1
        return {worker: WorkerLoad(tokens.get(worker, 0), sequences.get(worker, 0)) for worker in {*tokens, *sequences}}

    def stats(self) -> RouterStats:
        queue = self.admission.queue
        return RouterStats(
            running=len(self.live) - len(queue),
            waiting=len(queue),
            waiting_tokens=queue.prompt_tokens,
            retried=self.retried,
            ignored=self.ignored,
        )

    def is_needed(self, worker_id: WorkerId) -> bool:
        """Whether a live request still depends on this worker."""
        return any(live.needs(worker_id) for live in self.live.values())

    def transport(self, prefill: WorkerView, decode: WorkerView) -> str | None:
        """How pages would go from one worker to another, if at all."""
        return self._routing.transport(prefill, decode)

    def _granted(self, worker_id: WorkerId, request_id: str, ticket: bytes) -> list[RouterAction]:
        live = self._attempts.get(request_id)
        if live is None or live.route.decode != worker_id or live.route.prefill is None:
            self.ignored += 1
            return [AbortOn(worker_id, request_id)]
        request, outputs = replace(live.request, request_id=request_id), tuple(live.output_token_ids)
        return [StartPrefill(live.route.prefill, request, ticket, worker_id, live.route.transport, outputs)]

    # tokens

    def _first_token(self, event: FirstTokenMade, now: float) -> list[RouterAction]:
        live = self._attempts.get(event.output.request_id)
        if live is not None:
            live.prefill_tokens = 0
            if live.attempt == 1:  # what the client is told is how its prompt fared
                live.num_cached_tokens = event.num_cached_tokens
                live.timeline.queue_seconds = live.timeline.queued + event.queue_seconds
                live.timeline.prefill_seconds = event.prefill_seconds
        return self._token(event.worker_id, event.output, now)

    def _token(self, worker_id: WorkerId, output: TokenOutput, now: float) -> list[RouterAction]:
        live = self._attempts.get(output.request_id)
        if live is None or worker_id not in live.workers or output.index < len(live.output_token_ids):
            self.ignored += 1
            return []
        live.early[output.index] = output
        actions: list[RouterAction] = []
        while (following := live.early.pop(len(live.output_token_ids), None)) is not None:
            live.output_token_ids.append(following.token.token_id)
            live.timeline.token(now)
            actions.append(Deliver(replace(following, request_id=live.request.request_id)))
            if following.finish is not None:
                live.timeline.finished = now
                actions += self._end(live.request.request_id, finished_on=worker_id)
                break
        return actions

    # ends

    def _end(self, request_id: str, finished_on: WorkerId | None = None) -> list[RouterAction]:
        """Forget a request and have every worker let go of it, except where it ended by itself."""
        live = self.live.pop(request_id, None)
        if live is None:
            return []
        self.admission.leave(live.request)
        return self._let_go(live, finished_on)

    def _let_go(self, live: LiveRequest, finished_on: WorkerId | None) -> list[RouterAction]:
        """Have the workers of this attempt stop, except where it has ended by itself."""
        self._attempts.pop(live.attempt_id, None)  # one that waits has no attempt yet
        done = {finished_on, live.route.prefill if live.handed_over else None}
        return [AbortOn(worker, live.attempt_id) for worker in live.workers if worker not in done]

    def _failed(self, event: RequestFailed, now: float) -> list[RouterAction]:
        live = self._attempts.get(event.request_id)
        if live is None or event.worker_id not in live.workers:
            self.ignored += 1
            return []
        if event.worker_id == live.route.prefill and live.handed_over:
            return []  # only the news that its pages were accepted got lost
        if event.worker_id == live.route.decode and event.code == "handoff_abandoned":
            return []  # the prefill worker had a reason (say, the first token was the last), and gives it itself
        if live.route.prefill is not None and event.code in FAILED_HANDOFFS:
            self._suspects.suspect((live.route.prefill, live.route.decode), now)
        return self._try_again(live, ServingError(event.message, code=event.code), event.worker_id, now)

    def _worker_gone(self, worker_id: WorkerId, now: float) -> list[RouterAction]:
        self.workers.pop(worker_id, None)
        self._index.forget_worker(worker_id)
        self._suspects.forget(worker_id)
        actions: list[RouterAction] = []
        for live in list(self.live.values()):
            if not live.needs(worker_id):
                continue
            error = ServingError(f"worker {worker_id} was lost while it served this request", code=LOST_WORKER)
            actions += self._try_again(live, error, worker_id, now)
        return actions

    def _try_again(self, live: LiveRequest, error: ServingError, failed_on: WorkerId, now: float) -> list[RouterAction]:
        """Continue the log elsewhere, or end the stream with the error."""
        actions = self._let_go(live, failed_on)
        prefer = preference_after(error.code, live.attempt, live.request.prefer)
        log = (*live.request.prompt_token_ids, *live.output_token_ids)
        live.prefill_tokens = 0
        place = None if prefer is None else self._place(log, live.request, prefer, now)
        if place is None:
            del self.live[live.request.request_id]
            self.admission.leave(live.request)
            return [*actions, DeliverFailure(live.request.request_id, error)]
        self.retried += 1
        live.attempt += 1
        live.num_resumed = len(live.output_token_ids)
        live.early.clear()
        return actions + self._start(live, place)


@lru_cache(maxsize=8)
def _block_hashes(log: tuple[int, ...], block_size: int, salt: str) -> list[BlockHash]:
    """Those of a request whose turn it is are asked for again and again until there is room."""
    return block_hashes(log, block_size, salt)


def _may_make_room(event: RouterEvent) -> bool:
    """Whether something in the queue might start after it. Not after tokens in the middle of an answer; and a
    submission has looked already."""
    if isinstance(event, TokensMade):
        return any(output.finish is not None for output in event.outputs)
    return not isinstance(event, RequestSubmitted)
