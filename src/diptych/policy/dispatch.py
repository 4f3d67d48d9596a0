"""The router's brain: the life of every request, from submission to its last token.

    submitted ── local ──────────────────────────────► StartLocal ──► first token ──► tokens ──► end
        └────── split ► ReserveBlocks ─ ticket ► StartPrefill ─┬─ first token (from the prefill worker)
                                                               └─ tokens 2... (from the decode worker)

A request that is let in waits in the fair queue of `policy.admission` until the workers of its best route have room.
The log of record is kept here. Tokens come from two workers over two connections, so they are put in
order by their index; a duplicate is dropped. Whatever ends a request on one worker ends it on the other.

A worker or hand-off that fails does not end the request: the log so far is continued elsewhere, by a new
attempt (`policy.recovery` says how), and while nobody can take it, it waits here. Workers know each attempt by an
id of its own, so what an older one still sends means nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from diptych.core.actions import AbortOn, Deliver, DeliverFailure, RouterAction
from diptych.core.errors import DiptychError, OverloadedError, ServingError, UnavailableError
from diptych.core.events import (
    BlocksCached,
    FirstTokenMade,
    RequestCancelled,
    RequestFailed,
    RequestSubmitted,
    RouterEvent,
    Tick,
    TicketGranted,
    TokensMade,
    WorkerGone,
    WorkerUpdated,
)
from diptych.core.fleet import Readiness, RouterStats, WorkerId, WorkerView
from diptych.core.request import Request, TokenOutput
from diptych.core.timeline import Timeline
from diptych.policy.admission import RESTART_SECONDS, Admission, AdmissionLimits
from diptych.policy.attempts import Attempts
from diptych.policy.deadlines import TOTAL_TIMEOUT, Wait
from diptych.policy.departures import Departures
from diptych.policy.health import Health
from diptych.policy.live_request import LiveRequest
from diptych.policy.placement import Placement
from diptych.policy.prefix_index import PrefixIndex
from diptych.policy.races import Races
from diptych.policy.recovery import POISON, POISON_CRASHES, SETTLE_SECONDS, Fault, RecoverySettings, fault
from diptych.policy.retry_budget import RetryBudget
from diptych.policy.routing import Routing, WorkerLoad
from diptych.policy.saturation import Room
from diptych.policy.shadows import Shadows


class RouterPolicy:
    """The decisions of the router.

    Attributes:
        live: accepted requests that have not ended, by id. (Shadows are not among them.)
        ignored: messages about requests that are over, and tokens that came twice.
    """

    def __init__(
        self,
        routing: Routing,
        limits: AdmissionLimits | None = None,
        index: PrefixIndex | None = None,
        recovery: RecoverySettings | None = None,
    ) -> None:
        settings = recovery or RecoverySettings()
        self.live: dict[str, LiveRequest] = {}
        self.ignored = 0
        self.health = Health(settings.worker, settings.pair)
        self._placement = Placement(routing, index or PrefixIndex(capacity=1 << 20))
        self._budget = RetryBudget()
        self._attempts = Attempts(self._placement, self.health, self._budget)
        self._shadows = Shadows(self._attempts, self._placement, self.health, settings)
        self._races = Races(self._attempts)
        self._departures = Departures(self._attempts, settings.deadlines)
        self._limits = limits or AdmissionLimits()
        self.admission = Admission(self._limits)
        self._deadlines = settings.deadlines

    def handle(self, event: RouterEvent, now: float) -> list[RouterAction]:
        """Take one event; returns what to do, in order."""
        actions = self._handle(event, now)
        if not isinstance(event, RequestSubmitted):
            actions += self._shadows.probe(now)
            actions += self._attempts.resume(now)
            if self.admission.queue and _may_make_room(event):
                actions += self._start_waiting(now)
        return actions

    def _handle(self, event: RouterEvent, now: float) -> list[RouterAction]:
        match event:
            case RequestSubmitted(request):
                return self._submit(request, now)
            case RequestCancelled(request_id):
                return self._cancel(request_id, now)
            case TicketGranted():
                return self._granted(event, now)
            case FirstTokenMade():
                return self._first_token(event, now)
            case TokensMade(worker_id, outputs):
                self.health.token_from(worker_id, now)
                return [action for output in outputs for action in self._token(worker_id, output, now)]
            case RequestFailed():
                return self._failed(event, now)
            case WorkerUpdated(view):
                return self._worker_updated(view, now)
            case WorkerGone(worker_id):
                return self._worker_gone(worker_id, now)
            case BlocksCached(worker_id, stored, evicted):
                self._placement.index.store(worker_id, stored)
                self._placement.index.evict(worker_id, evicted)
                return []
            case Tick():
                return self._tick(now)

    # what others may know

    @property
    def workers(self) -> dict[WorkerId, WorkerView]:
        """As they last reported."""
        return self._placement.workers

    @property
    def retried(self) -> int:
        """Attempts after the first."""
        return self._attempts.retried

    @property
    def moved(self) -> int:
        """Streams handed over by workers that leave."""
        return self._departures.moved

    def stats(self, now: float) -> RouterStats:
        waiting = len(self.admission.queue) + len(self._attempts.waiting)
        return RouterStats(
            running=len(self.live) - waiting,
            waiting=waiting,
            waiting_tokens=self.admission.queue.prompt_tokens,
            retried=self.retried,
            moved=self.moved,
            checkpoints=self._shadows.checkpoints.taken,
            checkpoint_tokens=self._shadows.checkpoints.tokens,
            ignored=self.ignored,
            worker_breakers=self.health.workers.states(now),
            pair_breakers=self.health.pairs.states(now),
        )

    def loads(self) -> dict[WorkerId, WorkerLoad]:
        """What each worker has been given and not finished."""
        return self._attempts.loads()

    def is_needed(self, worker_id: WorkerId) -> bool:
        """Whether a live request still depends on this worker."""
        return any(live.needs(worker_id) for live in self._attempts.running.values() if live.shadow is None)

    def serving(self) -> list[WorkerView]:
        """Workers that get clients' requests: ready, and trusted."""
        return self._attempts.trusted()

    def readiness(self) -> Readiness:
        """A pair, or a worker that does both, is ready and trusted; of pairs, one that has handed KV over."""
        return self._shadows.paths.readiness(self.serving(), self.health.pairs.blocked())

    def transport(self, prefill: WorkerView, decode: WorkerView) -> str | None:
        """How pages would go from one worker to another, if at all."""
        return self._placement.transport(prefill, decode)

    def wake_at(self, now: float) -> float | None:
        """When a `Tick` would start something (deadlines are content with one a second); None if nothing is planned."""
        return self._attempts.wake_at(now)

    # beginning

    def check(self, tenant: str) -> OverloadedError | None:
        """Why no request of this tenant, however small, would come in now; None if one might."""
        return self.admission.refusal(tenant, 0, None, self._room())

    def _submit(self, request: Request, now: float) -> list[RouterAction]:
        error = self.admission.refusal(request.tenant, len(request.prompt_token_ids), request.timeout, self._room())
        if error is not None:
            return [DeliverFailure(request.request_id, error)]
        self._budget.request(now)
        request = replace(request, weight=self._limits.of(request.tenant).weight)
        self.live[request.request_id] = LiveRequest(request, Timeline(arrived=now), now)
        self.admission.enter(request, now)
        return self._start_waiting(now)

    def _start_waiting(self, now: float) -> list[RouterAction]:
        """Begin what there is room for, in fair order; give up what has waited for too long."""
        actions: list[RouterAction] = []
        for request_id, error in self.admission.expired(now):
            actions += self._give_up(self.live[request_id], error, now)
        have_enough: set[str] = set()  # tenants
        while (next_id := self.admission.next(room := self._room(), have_enough)) is not None:
            live = self.live[next_id]
            place = self._attempts.place(live)
            if place is None or not room.fits(place.route, live.prompt):
                break  # where it is served best they are busy: that is sooner done than what is second best
            if room.has_enough(place.route, live.prompt):
                have_enough.add(live.request.tenant)
                continue
            self.admission.start(next_id, now)
            actions += [self._attempts.begin(live, place, now), *self._races.start(live, self._room, now)]
        return actions

    def _room(self) -> Room:
        return Room(self.workers.values(), self._attempts.pending(), self._limits.room)

    def _granted(self, event: TicketGranted, now: float) -> list[RouterAction]:
        live = self._attempts.running.get(event.request_id)
        if live is None or live.pair is None or live.pair[1] != event.worker_id:
            self.ignored += 1
            return [AbortOn(event.worker_id, event.request_id)]
        live.kv_at[event.worker_id] = event.num_cached_tokens
        start = live.prefill_with(event.ticket, now)
        if start is None:
            self.ignored += 1
            return []
        return [start]

    # tokens

    def _first_token(self, event: FirstTokenMade, now: float) -> list[RouterAction]:
        self.health.token_from(event.worker_id, now)
        live = self._attempts.running.get(event.output.request_id)
        actions: list[RouterAction] = []
        if live is not None and event.worker_id in live.workers:
            live, actions = self._races.decide(live, now)
            live.prefill_tokens = 0
            live.kv_at[event.worker_id] = len(live.request.prompt_token_ids) + live.num_resumed
            if live.attempt == 1:  # what the client is told is how its prompt fared
                live.num_cached_tokens = event.num_cached_tokens
                live.timeline.queue_seconds = live.timeline.queued + event.queue_seconds
                live.timeline.prefill_seconds = event.prefill_seconds
        return actions + self._token(event.worker_id, event.output, now)

    def _token(self, worker_id: WorkerId, output: TokenOutput, now: float) -> list[RouterAction]:
        live = self._attempts.running.get(output.request_id)
        if live is None or worker_id not in live.workers or output.index < len(live.output_token_ids):
            self.ignored += 1
            return []
        live.early[output.index] = output
        actions: list[RouterAction] = []
        while (following := live.early.pop(len(live.output_token_ids), None)) is not None:
            live.append(following.token.token_id, now)
            if live.shadow is None:
                actions.append(Deliver(replace(following, request_id=live.request.request_id)))
            if following.finish is not None:
                live.timeline.finished = now
                self._shadows.succeeded(live, now)
                actions += self._end(live, now, finished_on=worker_id)
                break
        if not self.admission.queue:
            actions += self._shadows.copy(live, now)
        return actions

    # ends

    def _cancel(self, request_id: str, now: float) -> list[RouterAction]:
        live = self.live.get(request_id)
        return [] if live is None else self._end(live, now)

    def _end(self, live: LiveRequest, now: float, finished_on: WorkerId | None = None) -> list[RouterAction]:
        """Forget a request and have every worker let go of it, except where it ended by itself."""
        if self.live.pop(live.request.request_id, None) is not None:
            self.admission.leave(live.request)
        return self._attempts.let_go(live, now, finished_on)

    def _give_up(
        self, live: LiveRequest, error: DiptychError, now: float, failed_on: WorkerId | None = None
    ) -> list[RouterAction]:
        """End the client's stream with an error."""
        return [*self._end(live, now, failed_on), DeliverFailure(live.request.request_id, error)]

    def _failed(self, event: RequestFailed, now: float) -> list[RouterAction]:
        live = self._attempts.running.get(event.request_id)
        if live is None or live.route is None or event.worker_id not in live.workers:
            self.ignored += 1
            return []
        if event.worker_id == live.route.prefill and live.handed_over:
            return []  # only the news that its pages were accepted got lost
        if event.worker_id == live.route.decode and event.code == "handoff_abandoned":
            return []  # the prefill worker had a reason (say, the first token was the last), and gives it itself
        if live.shadow is not None:
            return self._shadows.failed(live, now, event.worker_id, event.code)
        verdict = fault(event.code, live.pair is not None)
        if verdict is Fault.REQUEST:
            return self._give_up(live, ServingError(event.message, code=event.code), now, event.worker_id)
        if verdict is Fault.PAIR and live.pair is not None:
            self.health.handoff_failed(live.pair, now)
        elif verdict is Fault.WORKER:
            self.health.worker_failed(event.worker_id, now)
            live.crashes += 1
        avoid = () if verdict is Fault.PAIR else (event.worker_id,)
        return self._continue(live, event.message, now, failed_on=event.worker_id, avoid=avoid)

    def _continue(
        self, live: LiveRequest, why: str, now: float, *, failed_on: WorkerId, avoid: Collection[WorkerId] = ()
    ) -> list[RouterAction]:
        """The attempt has failed: continue the log elsewhere, now or when somebody can."""
        if live.crashes >= POISON_CRASHES:
            message = f"{live.crashes} workers in a row failed while they served this request; the last: {why}"
            return self._give_up(live, ServingError(message, code=POISON), now, failed_on)
        live.last_error = why
        replaced = self._races.replace(live, now, failed_on)
        if replaced is not None:
            return replaced
        actions = self._attempts.let_go(live, now, failed_on)
        return actions + self._attempts.retry(live, now, avoid)

    # workers

    def _worker_updated(self, view: WorkerView, now: float) -> list[RouterAction]:
        if view.worker_id not in self.workers:
            self._shadows.paths.joined(view.worker_id)
        self.workers[view.worker_id] = view
        return self._departures.updated(view, now)

    def _worker_gone(self, worker_id: WorkerId, now: float) -> list[RouterAction]:
        self.workers.pop(worker_id, None)
        self._shadows.paths.gone(worker_id)
        died = not self._departures.gone(worker_id)
        self._placement.index.forget_worker(worker_id)
        self.health.gone(worker_id, now, died=died)
        for live in self.live.values():
            live.kv_at.pop(worker_id, None)
        actions: list[RouterAction] = []
        for live in list(self._attempts.running.values()):
            if not live.needs(worker_id):
                continue
            if live.shadow is not None:
                actions += self._shadows.lost(live, now, worker_id)
                continue
            sent_too_late = live.retries == 1 and now - live.began < SETTLE_SECONDS
            live.crashes += died and not sent_too_late and live.computes_on(worker_id)
            actions += self._continue(live, f"worker {worker_id} was lost", now, failed_on=worker_id)
        return actions

    # deadlines

    def _tick(self, now: float) -> list[RouterAction]:
        self.health.prune(now)
        actions = self._departures.tick(self.workers, now)
        for live in list(self.live.values()):
            actions += self._check_deadlines(live, now)
        return actions + self._shadows.check_deadlines(now)

    def _check_deadlines(self, live: LiveRequest, now: float) -> list[RouterAction]:
        age, waited, limits = now - live.timeline.arrived, now - live.wait_since, self._deadlines
        total = limits.total if live.request.timeout is None else min(limits.total, live.request.timeout)
        if age > total:
            return self._time_out(live, f"the request was not finished within {total:g} s", TOTAL_TIMEOUT, now)
        if live.attempt == 0:
            return []  # the fair queue has a limit of its own
        limit = limits.of(live.wait)
        if live.wait is Wait.QUEUE:
            if live.queued + waited <= limit:
                return []
            why = f"; the last one: {live.last_error}" if live.last_error else ""
            return self._time_out(
                live, f"no worker could take the request within {limit:g} s{why}", live.wait.code, now
            )
        return self._late(live, now) if waited > limit else []

    def _late(self, live: LiveRequest, now: float) -> list[RouterAction]:
        """A worker lets a stream wait for too long. Continue it elsewhere; with nobody else, wait on for a while (one
        that has begun, and only waits for its turn, for as long as it takes)."""
        if not live.is_late:
            live.is_late = True
            self.health.late(live, now)
        place = None if live.awaited is None else self._attempts.place(live, avoid=(live.awaited,))
        if place is not None and self._attempts.spend(live, now):
            live.retries += 1
            return self._attempts.move(live, place, now)
        limit = self._deadlines.of(live.wait) + self._deadlines.queue
        if now - live.wait_since <= limit or (live.output_token_ids and not self.health.is_stuck(live)):
            return []
        return self._time_out(live, f"nothing has come for {limit:g} s", live.wait.code, now)

    def _time_out(self, live: LiveRequest, message: str, code: str, now: float) -> list[RouterAction]:
        return self._give_up(live, UnavailableError(message, retry_after=RESTART_SECONDS, code=code), now)


def _may_make_room(event: RouterEvent) -> bool:
    """Whether something in the queue might start after it: not after tokens in the middle of an answer."""
    return not isinstance(event, TokensMade) or any(output.finish is not None for output in event.outputs)
