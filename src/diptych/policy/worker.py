"""One worker's brain: everything it decides, none of what it does.

    router ──ServeRequested/ReserveRequested/PrefillRequested/AbortRequested──┐
    engine ──StepFinished/StepFailed──────────────────────────────────────────┤ handle(event, now)
    transfer ──PushAccepted/.../HandoffComplete/WriterGone────────────────────┤      │
    clock ──Tick──────────────────────────────────────────────────────────────┘      ▼
                                            RunStep, PushPages, GrantTicket, SendTokens, ...

There is one step in flight at most. Whatever would take blocks from a sequence of that step waits until
the step is over, so an engine may read sequences without a copy; or until the engine has said that it goes on
without that sequence (DropRow, RowsDropped).

With data-parallel attention each data-parallel rank has a brain like this one, and `policy.data_parallel`
keeps them in step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress

from diptych.core.actions import (
    DropRow,
    ForgetRequest,
    PushPages,
    RunStep,
    SendFailure,
    SendFirstToken,
    SendTokens,
    WorkerAction,
)
from diptych.core.blocks import BlockHash, BlockId
from diptych.core.events import (
    AbortRequested,
    HandoffComplete,
    HandoffFailed,
    LinkLost,
    PrefillRequested,
    PushAccepted,
    PushCancelled,
    PushRejected,
    PushStopped,
    ReserveRequested,
    RowsDropped,
    ServeRequested,
    StepFailed,
    StepFinished,
    Tick,
    WorkerEvent,
    WriterGone,
)
from diptych.core.fleet import WorkerStats
from diptych.core.kv_layout import KVLayout
from diptych.core.request import SampledToken, TokenOutput
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.policy.batching import BatchLimits, Scheduler
from diptych.policy.block_pool import BlockPool
from diptych.policy.handoff import SourceEvent, TargetEvent
from diptych.policy.handoff_source import SourceHandoffs
from diptych.policy.handoff_target import TargetHandoffs
from diptych.policy.step_rates import StepRates
from diptych.policy.stopping import finish_reason

HANDOFF_TIMEOUT = 120.0  # seconds from ticket to complete KV


@dataclass(slots=True)
class _Life:
    """What this worker knows of a request beyond its log."""

    sequence: Sequence
    arrived: float
    scheduled: float | None = None
    first_token: bool = False  # has been made (or came with the hand-off)


class WorkerPolicy:
    """The decisions of one worker, whatever its role (or of one of its data-parallel ranks)."""

    def __init__(
        self,
        layout: KVLayout,
        pool: BlockPool,
        limits: BatchLimits,
        eos_token_ids: tuple[int, ...],
        *,
        handoff_timeout: float = HANDOFF_TIMEOUT,
        data_rank: int = 0,
    ) -> None:
        self.pool = pool
        self.data_rank = data_rank
        self.scheduler = Scheduler(pool, limits)
        self.source = SourceHandoffs(layout, pool, self.scheduler)
        self.target = TargetHandoffs(pool, self.scheduler, max_sequences=limits.max_sequences, timeout=handoff_timeout)
        self.rates = StepRates()
        self.rows_dropped = 0
        self._eos = eos_token_ids
        self._lives: dict[str, _Life] = {}
        self._in_flight: Batch | None = None
        self._in_flight_ids: frozenset[str] = frozenset()  # of its rows, without those that were dropped
        self._after_step: list[WorkerEvent] = []

    def handle(self, event: WorkerEvent, now: float) -> list[WorkerAction]:
        """Take one event; returns what to do, in order."""
        actions = self.take(event, now)
        return actions if self._in_flight is not None else actions + self.schedule(now)

    def take(self, event: WorkerEvent, now: float) -> list[WorkerAction]:
        """All of `handle` but the next step, which is for `schedule`."""
        actions: list[WorkerAction] = []
        for part in per_request(event):
            if self._in_flight_ids.isdisjoint(ended := _at_an_end(part)):
                actions += self._handle(part, now)
            else:
                self._after_step.append(part)
                actions += map(DropRow, ended)
        return actions + self._catch_up(now)

    def step_undone(self, now: float) -> list[WorkerAction]:
        """The running step came to nothing, and no sequence here is to blame: it will be scheduled again."""
        self._step_over()
        return self._catch_up(now)

    def _catch_up(self, now: float) -> list[WorkerAction]:
        """What has become possible: events that waited for the end of a step, or of a row, and tickets for new room."""
        actions: list[WorkerAction] = []
        put_off, self._after_step = self._after_step, []
        for part in put_off:
            if self._in_flight_ids.isdisjoint(_at_an_end(part)):
                actions += self._handle(part, now)
            else:
                self._after_step.append(part)
        return actions + self.target.grant(now)

    def _handle(self, event: WorkerEvent, now: float) -> list[WorkerAction]:
        match event:
            case StepFinished():
                return self._step_finished(event, now)
            case StepFailed():
                return self._step_failed(event)
            case RowsDropped(request_ids):
                self.rows_dropped += len(self._in_flight_ids.intersection(request_ids))
                self._in_flight_ids = self._in_flight_ids.difference(request_ids)
                return []
            case ServeRequested() | ReserveRequested() | PrefillRequested():
                return self._arrive(event, now)
            case AbortRequested(request_id):
                return self._abort(request_id)
            case Tick():
                return self._check_deadlines(now)
            case HandoffComplete() | HandoffFailed() | WriterGone():
                return self._target_event(event)
            case PushAccepted() | PushRejected() | PushCancelled() | PushStopped() | LinkLost():
                return self._source_event(event)

    # arrivals and departures

    def _arrive(self, event: ServeRequested | ReserveRequested | PrefillRequested, now: float) -> list[WorkerAction]:
        sequence = Sequence.from_log(event.request, event.output_token_ids)
        sequence.data_rank = self.data_rank
        request_id = sequence.request_id
        if self.knows(request_id):
            return [SendFailure(request_id, "duplicate_request", "this worker already serves a request of that id")]
        if not self.scheduler.fits(sequence.num_tokens + 1):
            return [SendFailure(request_id, "kv_exhausted", "the request needs more KV blocks than this worker has")]
        if isinstance(event, PrefillRequested):
            refusal = self.source.refusal(sequence, event.claims)
            if refusal is not None:
                return [SendFailure(request_id, "ticket_refused", refusal)]
            self.source.open(sequence, event.claims)
        elif isinstance(event, ReserveRequested):
            self.target.reserve(sequence)
        else:
            self.scheduler.add(sequence)
        self._lives[request_id] = _Life(sequence, now)
        return []

    def _abort(self, request_id: str) -> list[WorkerAction]:
        life = self._lives.pop(request_id, None)
        forget: list[WorkerAction] = [ForgetRequest(request_id)]
        if request_id in self.source:
            return self.source.on(request_id, SourceEvent.ABORTED) + forget
        if request_id in self.target:
            return self.target.on(request_id, TargetEvent.ABORTED) + forget
        if life is None:
            return []
        if not self.target.withdraw(request_id):
            self.scheduler.remove(life.sequence)
        return forget

    def _fail(self, request_id: str, code: str, message: str) -> list[WorkerAction]:
        return [SendFailure(request_id, code, message), *self._abort(request_id)]

    # steps

    def schedule(self, now: float) -> list[WorkerAction]:
        """Begin the next step, if there is one: the last action is its RunStep then. Not while one runs."""
        actions: list[WorkerAction] = []
        batch = self.scheduler.schedule()
        for sequence in self.scheduler.starved:
            actions += self._fail(sequence.request_id, "kv_exhausted", "the sequence outgrew this worker's KV blocks")
        if batch is None:
            return actions
        during: list[PushPages] = []
        for row in batch.rows:
            life = self._lives[row.sequence.request_id]
            if life.scheduled is None:
                life.scheduled = now
            ready, made = self.source.pushes(row)
            if ready is not None:
                actions.append(ready)
            if made is not None:
                during.append(made)
        self._in_flight = batch
        self._in_flight_ids = frozenset(row.sequence.request_id for row in batch.rows)
        actions.append(RunStep(batch, tuple(during)))
        return actions

    def _step_over(self) -> tuple[Batch, frozenset[str]]:
        """The step that has ended, and which of its requests took part in it to the end."""
        batch, request_ids = self._in_flight, self._in_flight_ids
        if batch is None:
            raise ValueError("a step ended that was never started")
        self._in_flight, self._in_flight_ids = None, frozenset()
        return batch, request_ids

    def _step_finished(self, event: StepFinished, now: float) -> list[WorkerAction]:
        batch, request_ids = self._step_over()
        if len(request_ids) == len(batch.rows):
            self.rates.observe(batch, event.seconds)
        rows = [row.sequence.request_id in request_ids for row in batch.rows]
        self.scheduler.complete(Batch(tuple(compress(batch.rows, rows))))
        actions: list[WorkerAction] = []
        outputs: list[TokenOutput] = []
        for row, token in compress(zip(batch.rows, event.samples, strict=True), rows):
            if token is not None:
                actions += self._token(row, token, outputs, now)
        if outputs:
            actions.append(SendTokens(tuple(outputs)))
        return actions

    def _token(
        self, row: ScheduledSequence, token: SampledToken, outputs: list[TokenOutput], now: float
    ) -> list[WorkerAction]:
        """Append a sampled token to its log, and send it, end it or hand it over."""
        sequence = row.sequence
        request_id = sequence.request_id
        life = self._lives[request_id]
        sequence.token_ids.append(token.token_id)
        finish = finish_reason(sequence, self._eos)
        output = TokenOutput(request_id, sequence.num_output_tokens - 1, token, finish)
        actions: list[WorkerAction] = []
        if life.first_token:
            outputs.append(output)
        else:
            life.first_token = True
            actions.append(self._first_token(life, output, now))
        if finish is not None:
            actions += self._abort(request_id)
        elif request_id in self.source:
            del self._lives[request_id]
            actions += [*self.source.offer(request_id, token), ForgetRequest(request_id)]
        return actions

    def _first_token(self, life: _Life, output: TokenOutput, now: float) -> SendFirstToken:
        scheduled = life.arrived if life.scheduled is None else life.scheduled
        return SendFirstToken(output, life.sequence.num_cached_tokens, scheduled - life.arrived, now - scheduled)

    def _step_failed(self, event: StepFailed) -> list[WorkerAction]:
        batch, request_ids = self._step_over()
        blamed = event.request_ids or tuple(row.sequence.request_id for row in batch.rows)
        actions: list[WorkerAction] = []
        for request_id in blamed:
            if request_id in request_ids:
                actions += self._fail(request_id, event.code, event.message)
        return actions

    # hand-offs

    def _target_event(self, event: HandoffComplete | HandoffFailed | WriterGone) -> list[WorkerAction]:
        match event:
            case HandoffComplete(request_id, token):
                if self.target.complete(request_id, token) is not None:
                    self._lives[request_id].first_token = True
                return []
            case HandoffFailed(request_id, code, message):
                return self._lost(request_id, self.target.on(request_id, TargetEvent.FAILED, code, message))
            case WriterGone(request_id):
                return self.target.on(request_id, TargetEvent.WRITER_GONE)

    def _source_event(
        self, event: PushAccepted | PushRejected | PushCancelled | PushStopped | LinkLost
    ) -> list[WorkerAction]:
        match event:
            case PushAccepted(request_id):
                return self.source.on(request_id, SourceEvent.ACCEPTED)
            case PushStopped(request_id):
                return self.source.on(request_id, SourceEvent.STOPPED)
            case PushRejected(request_id, code, message):
                return self._lost(request_id, self.source.on(request_id, SourceEvent.REJECTED, code, message))
            case PushCancelled(request_id):
                code, message = "handoff_cancelled", "the decode worker cancelled the hand-off"
                return self._lost(request_id, self.source.on(request_id, SourceEvent.CANCELLED, code, message))
            case LinkLost(worker_id, (request_id, *_)):
                code, message = "transfer_failed", f"the data connection to worker {worker_id} broke"
                return self._lost(request_id, self.source.on(request_id, SourceEvent.LINK_LOST, code, message))
            case LinkLost():
                return []

    def _lost(self, request_id: str, actions: list[WorkerAction]) -> list[WorkerAction]:
        """If a hand-off's actions report a failure, the request is over here."""
        if any(isinstance(action, SendFailure) for action in actions):
            self._lives.pop(request_id, None)
            actions.append(ForgetRequest(request_id))
        return actions

    def _check_deadlines(self, now: float) -> list[WorkerAction]:
        actions: list[WorkerAction] = []
        for request_id in self.target.overdue(now):
            message = "the pages of this request did not arrive in time"
            actions += self._target_event(HandoffFailed(request_id, "handoff_timeout", message))
        return actions

    # what others may know

    @property
    def idle(self) -> bool:
        """No request is left here, in any state."""
        return not self._lives and not self.source.blocks_held() and not self.target.blocks_held()

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Those that live here."""
        return tuple(self._lives)

    def knows(self, request_id: str) -> bool:
        """Whether it lives here, or has left blocks here that somebody else still reads or writes."""
        return request_id in self._lives or request_id in self.source or request_id in self.target

    def drain_cache_events(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Hashes (stored, evicted) since the last call, for the router's prefix index."""
        return self.pool.drain_events()

    def stats(self) -> WorkerStats:
        """The load as reported to the router."""
        return WorkerStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + self.target.num_waiting,
            blocks_used=self.pool.num_used,
            blocks_cached=self.pool.num_cached,
            prefill_tokens_queued=self.scheduler.prefill_tokens_queued,
            prefill_rate=self.rates.prefill_rate,
            decode_step_seconds=self.rates.decode_step_seconds,
            preemptions=self.scheduler.num_preemptions,
            handoffs_failed=self.source.failed + self.target.failed,
            rows_dropped=self.rows_dropped,
        )

    def check_integrity(self) -> None:
        """Every block has exactly the owners that requests and hand-offs claim (raises IntegrityError)."""
        owners: dict[str, list[BlockId]] = {}
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            owners[sequence.request_id] = list(sequence.block_table)
        for side, held in (("source", self.source.blocks_held()), ("target", self.target.blocks_held())):
            for request_id, blocks in held.items():
                owners[f"{side} {request_id}"] = blocks
        self.pool.check_integrity(owners)


def _at_an_end(event: WorkerEvent) -> tuple[str, ...]:
    """The requests that an event ends here, so that their blocks go back."""
    match event:
        case AbortRequested(request_id) | PushRejected(request_id) | PushCancelled(request_id):
            return (request_id,)
        case LinkLost(_, request_ids):
            return request_ids
        case _:
            return ()


def per_request(event: WorkerEvent) -> Iterable[WorkerEvent]:
    """A lost link concerns each of its requests on its own."""
    if isinstance(event, LinkLost):
        return [LinkLost(event.worker_id, (request_id,)) for request_id in event.request_ids]
    return [event]
