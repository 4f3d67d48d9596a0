"""The router's brain: the life of every request, from submission to its last token.

    submitted ── local ──────────────────────────────► StartLocal ──► first token ──► tokens ──► end
        └────── split ► ReserveBlocks ─ ticket ► StartPrefill ─┬─ first token (from the prefill worker)
                                                               └─ tokens 2... (from the decode worker)

The log of record is kept here. Tokens come from two workers over two connections, so they are put in
order by their index; a duplicate is dropped. Whatever ends a request on one worker ends it on the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from diptych.core.actions import (
    AbortOn,
    Deliver,
    DeliverFailure,
    ReserveBlocks,
    RouterAction,
    StartLocal,
    StartPrefill,
)
from diptych.core.blocks import block_hashes
from diptych.core.errors import DiptychError, ServingError
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
from diptych.core.fleet import Route, WorkerId, WorkerView
from diptych.core.request import Request, TokenOutput
from diptych.core.timeline import Timeline
from diptych.policy.admission import AdmissionLimits, refusal
from diptych.policy.prefix_index import PrefixIndex
from diptych.policy.routing import Demand, Routing, WorkerLoad


@dataclass(slots=True)
class LiveRequest:
    """The log of record of one stream, and what the client is told about it."""

    request: Request
    route: Route
    timeline: Timeline
    prefill_tokens: int  # credited to the worker that prefills, until the first token
    output_token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    early: dict[int, TokenOutput] = field(default_factory=dict)  # tokens ahead of a missing one

    @property
    def prefiller(self) -> WorkerId:
        return self.route.prefill or self.route.decode

    @property
    def handed_over(self) -> bool:
        """The decode worker has gone on from the first token: the prefill worker's part is done."""
        return len(self.output_token_ids) > 1 or bool(self.early)

    def needs(self, worker_id: WorkerId) -> bool:
        """Whether it cannot go on without this worker."""
        return worker_id in self.workers and not (worker_id == self.route.prefill and self.handed_over)

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """Everybody who may hold blocks for it."""
        return (self.route.decode,) if self.route.prefill is None else (self.route.decode, self.route.prefill)


class RouterPolicy:
    """The decisions of the router."""

    def __init__(
        self, routing: Routing, limits: AdmissionLimits | None = None, index: PrefixIndex | None = None
    ) -> None:
        self.workers: dict[WorkerId, WorkerView] = {}
        self.live: dict[str, LiveRequest] = {}
        self.ignored = 0  # messages about requests that are over, and tokens that came twice
        self.routing = routing
        self._limits = limits or AdmissionLimits()
        self._index = index or PrefixIndex(capacity=1 << 20)

    def handle(self, event: RouterEvent, now: float) -> list[RouterAction]:
        """Take one event; returns what to do, in order."""
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
                return self._failed(event)
            case WorkerUpdated(view):
                self.workers[view.worker_id] = view
                return []
            case WorkerGone(worker_id):
                return self._worker_gone(worker_id)
            case BlocksCached(worker_id, stored, evicted):
                self._index.store(worker_id, stored)
                self._index.evict(worker_id, evicted)
                return []

    # beginning

    def _submit(self, request: Request, now: float) -> list[RouterAction]:
        loads = self.loads()
        queued = sum(load.prefill_tokens for load in loads.values())
        error = refusal(len(self.live), queued, self.workers.values(), self._limits)
        if error is not None:
            return [DeliverFailure(request.request_id, error)]
        demand = Demand(len(request.prompt_token_ids), self._cached_tokens(request), request.prefer)
        choice = self.routing.choose(demand, list(self.workers.values()), loads)
        if choice is None:
            raise ValueError("admission let a request in that no worker can take")
        route = choice.route
        uncached = demand.uncached(route.prefill or route.decode)
        timeline = Timeline(arrived=now, split=route.prefill is not None, dispatched=now)
        self.live[request.request_id] = LiveRequest(request, route, timeline, uncached)
        if route.prefill is None:
            return [StartLocal(route.decode, request)]
        return [ReserveBlocks(route.decode, request)]

    def _cached_tokens(self, request: Request) -> dict[WorkerId, int]:
        """Leading prompt tokens that each worker has in its prefix cache."""
        sizes = {worker.block_size for worker in self.workers.values()}
        cached: dict[WorkerId, int] = {}
        for size in sizes:
            hashes = block_hashes(request.prompt_token_ids, size, request.cache_salt)
            for worker_id, blocks in self._index.match(hashes).items():
                if worker_id in self.workers and self.workers[worker_id].block_size == size:
                    cached[worker_id] = blocks * size
        return cached

    def loads(self) -> dict[WorkerId, WorkerLoad]:
        """What each worker has been given and not finished."""
        tokens: dict[WorkerId, int] = {}
        sequences: dict[WorkerId, int] = {}
        for live in self.live.values():
            tokens[live.prefiller] = tokens.get(live.prefiller, 0) + live.prefill_tokens
            sequences[live.route.decode] = sequences.get(live.route.decode, 0) + 1
        return {worker: WorkerLoad(tokens.get(worker, 0), sequences.get(worker, 0)) for worker in {*tokens, *sequences}}

    def is_needed(self, worker_id: WorkerId) -> bool:
        """Whether a live request still depends on this worker."""
        return any(live.needs(worker_id) for live in self.live.values())

    def _granted(self, worker_id: WorkerId, request_id: str, ticket: bytes) -> list[RouterAction]:
        live = self.live.get(request_id)
        if live is None or live.route.decode != worker_id or live.route.prefill is None:
            self.ignored += 1
            return [AbortOn(worker_id, request_id)]
        return [StartPrefill(live.route.prefill, live.request, ticket, worker_id, live.route.transport)]

    # tokens

    def _first_token(self, event: FirstTokenMade, now: float) -> list[RouterAction]:
        live = self.live.get(event.output.request_id)
        if live is not None:
            live.prefill_tokens = 0
            live.num_cached_tokens = event.num_cached_tokens
            live.timeline.queue_seconds = event.queue_seconds
            live.timeline.prefill_seconds = event.prefill_seconds
        return self._token(event.worker_id, event.output, now)

    def _token(self, worker_id: WorkerId, output: TokenOutput, now: float) -> list[RouterAction]:
        live = self.live.get(output.request_id)
        if live is None or worker_id not in live.workers or output.index < len(live.output_token_ids):
            self.ignored += 1
            return []
        live.early[output.index] = output
        actions: list[RouterAction] = []
        while (following := live.early.pop(len(live.output_token_ids), None)) is not None:
            live.output_token_ids.append(following.token.token_id)
            live.timeline.token(now)
            actions.append(Deliver(following))
            if following.finish is not None:
                live.timeline.finished = now
                actions += self._end(output.request_id, finished_on=worker_id)
                break
        return actions

    # ends

    def _end(self, request_id: str, finished_on: WorkerId | None = None) -> list[RouterAction]:
        """Forget a request and have every worker let go of it, except where it ended by itself."""
        live = self.live.pop(request_id, None)
        if live is None:
            return []
        done = {finished_on, live.route.prefill if live.handed_over else None}
        return [AbortOn(worker, request_id) for worker in live.workers if worker not in done]

    def _fail(self, request_id: str, error: DiptychError, but: WorkerId) -> list[RouterAction]:
        return [*self._end(request_id, finished_on=but), DeliverFailure(request_id, error)]

    def _failed(self, event: RequestFailed) -> list[RouterAction]:
        live = self.live.get(event.request_id)
        if live is None or event.worker_id not in live.workers:
            self.ignored += 1
            return []
        if event.worker_id == live.route.prefill and live.handed_over:
            return []  # only the news that its pages were accepted got lost
        if event.worker_id == live.route.decode and event.code == "handoff_abandoned":
            return []  # the prefill worker had a reason (say, the first token was the last), and gives it itself
        return self._fail(event.request_id, ServingError(event.message, code=event.code), event.worker_id)

    def _worker_gone(self, worker_id: WorkerId) -> list[RouterAction]:
        self.workers.pop(worker_id, None)
        self._index.forget_worker(worker_id)
        actions: list[RouterAction] = []
        for request_id, live in list(self.live.items()):
            if not live.needs(worker_id):
                continue
            error = ServingError(f"worker {worker_id} was lost while it served this request", code="worker_lost")
            actions += self._fail(request_id, error, worker_id)
        return actions
