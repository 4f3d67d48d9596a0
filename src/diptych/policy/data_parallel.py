"""The brain of a worker with data-parallel attention: one `WorkerPolicy` for each rank, kept in step.

    event ──► the rank that knows its request (or is to take it) ──► actions
    end of a step ──► every rank, each with its own rows ──► every rank schedules ──► one RunStep for all

Each rank has a block pool, a scheduler and hand-offs of its own; a sequence lives on one of them from its
first block to its last. Only the steps are common: the experts of a layer are spread over all ranks, so all
of them go through it together, and one whose queue is empty comes along without rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

from diptych.core.actions import PushPages, RunStep, WorkerAction
from diptych.core.blocks import BlockHash, block_hashes
from diptych.core.events import (
    LinkLost,
    PrefillRequested,
    ReserveRequested,
    RowsDropped,
    ServeRequested,
    StepFailed,
    StepFinished,
    Tick,
    WorkerEvent,
)
from diptych.core.fleet import WorkerStats
from diptych.core.sequence import Batch
from diptych.policy.block_pool import IntegrityError
from diptych.policy.step_rates import StepRates
from diptych.policy.worker import WorkerPolicy, per_request

Arrival = ServeRequested | ReserveRequested | PrefillRequested


class DataParallelPolicy:
    """The decisions of one worker with several data-parallel ranks. To its loop it is like a WorkerPolicy."""

    def __init__(self, ranks: Sequence[WorkerPolicy]) -> None:
        self.ranks = tuple(ranks)
        self.rates = StepRates()
        self._in_flight: list[Batch] | None = None  # each rank's share, while a step runs
        self._is_whole = True  # no row of it was dropped
        self._holders: Counter[BlockHash] = Counter()  # by how many ranks a block is cached

    def handle(self, event: WorkerEvent, now: float) -> list[WorkerAction]:
        """Take one event; returns what to do, in order."""
        match event:
            case StepFinished():
                actions = self._step_finished(event, now)
            case StepFailed():
                actions = self._step_failed(event, now)
            case RowsDropped():
                self._is_whole = False
                actions = [action for rank in self.ranks for action in rank.take(event, now)]
            case Tick():
                actions = [action for rank in self.ranks for action in rank.take(event, now)]
            case _:
                actions = [action for part in per_request(event) for action in self._take(part, now)]
        return actions if self._in_flight is not None else actions + self._schedule(now)

    def _take(self, event: WorkerEvent, now: float) -> list[WorkerAction]:
        """An event about one request: for the rank that knows it, or is to take it. Others are late."""
        request_id = _request_id(event)
        rank = next((rank for rank in self.ranks if rank.knows(request_id)), None)
        if rank is None and isinstance(event, Arrival):
            rank = self._best_rank(event)
        return [] if rank is None else rank.take(event, now)

    def _best_rank(self, event: Arrival) -> WorkerPolicy:
        """Where the fewest tokens of KV would be held or owed with this log among them. What a rank's cache has
        costs it nothing; so a shared prefix attracts by its length, and a long queue repels by its own."""
        log = (*event.request.prompt_token_ids, *event.output_token_ids)
        size = self.ranks[0].pool.block_size
        hashes = block_hashes(log, size, event.request.cache_salt)

        def burden(rank: WorkerPolicy) -> tuple[int, int]:
            pool = rank.pool
            present = len(pool.match(hashes))
            waiting = rank.scheduler.tokens_waiting + rank.target.tokens_waiting
            return (pool.num_used - present) * size + waiting, pool.num_cached

        return min(self.ranks, key=burden)

    # steps

    def _schedule(self, now: float) -> list[WorkerAction]:
        """Have every rank begin its share of the next step; the shares, in order of ranks, are one step."""
        actions: list[WorkerAction] = []
        shares: list[Batch] = []
        pushes: list[PushPages] = []
        for rank in self.ranks:
            share = Batch(())
            for action in rank.schedule(now):
                if isinstance(action, RunStep):
                    share = action.batch
                    pushes += action.pushes
                else:
                    actions.append(action)
            shares.append(share)
        whole = Batch(tuple(row for share in shares for row in share.rows))
        if whole.rows:
            self._in_flight, self._is_whole = shares, True
            actions.append(RunStep(whole, tuple(pushes)))
        return actions

    def _step_over(self) -> list[tuple[WorkerPolicy, Batch]]:
        """The ranks that took part in the step, with their shares."""
        shares, self._in_flight = self._in_flight, None
        if shares is None:
            raise ValueError("a step ended that was never started")
        return [(rank, share) for rank, share in zip(self.ranks, shares, strict=True) if share.rows]

    def _step_finished(self, event: StepFinished, now: float) -> list[WorkerAction]:
        shares = self._step_over()
        if self._is_whole:
            self.rates.observe(Batch(tuple(row for _, share in shares for row in share.rows)), event.seconds)
        actions: list[WorkerAction] = []
        start = 0
        for rank, share in shares:
            end = start + len(share.rows)
            actions += rank.take(StepFinished(event.samples[start:end], event.seconds), now)
            start = end
        return actions

    def _step_failed(self, event: StepFailed, now: float) -> list[WorkerAction]:
        actions: list[WorkerAction] = []
        for rank, share in self._step_over():
            blamed = tuple(row.sequence.request_id for row in share.rows)
            if event.request_ids:
                blamed = tuple(request_id for request_id in blamed if request_id in event.request_ids)
            if blamed:
                actions += rank.take(StepFailed(event.code, event.message, blamed), now)
            else:
                actions += rank.step_undone(now)
        return actions

    # what others may know

    @property
    def idle(self) -> bool:
        """No request is left here, in any state."""
        return all(rank.idle for rank in self.ranks)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Those that live here."""
        return tuple(request_id for rank in self.ranks for request_id in rank.request_ids)

    def drain_cache_events(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Hashes (stored, evicted) since the last call: a block is here as long as one rank has it."""
        was_here: dict[BlockHash, bool] = {}
        for rank in self.ranks:
            for change, hashes in zip((1, -1), rank.drain_cache_events(), strict=True):
                for block_hash in hashes:
                    was_here.setdefault(block_hash, self._holders[block_hash] > 0)
                    self._holders[block_hash] += change
        gone = [block_hash for block_hash in was_here if self._holders[block_hash] == 0]
        for block_hash in gone:
            del self._holders[block_hash]
        stored = [block_hash for block_hash, before in was_here.items() if not before and block_hash in self._holders]
        return stored, [block_hash for block_hash in gone if was_here[block_hash]]

    def stats(self) -> WorkerStats:
        """The load of all ranks together, as reported to the router. Rates are those of common steps."""
        each = [rank.stats() for rank in self.ranks]
        total = {field.name: sum(getattr(stats, field.name) for stats in each) for field in fields(WorkerStats)}
        total |= {
            "prefill_rate": self.rates.prefill_rate,
            "decode_step_seconds": self.rates.decode_step_seconds,
        }
        return WorkerStats(**total)

    def check_integrity(self) -> None:
        """Every block of every rank has exactly the owners that are claimed (raises IntegrityError), and no
        request has blocks on two ranks."""
        for rank in self.ranks:
            rank.check_integrity()
        for request_id in self.request_ids:
            if sum(rank.knows(request_id) for rank in self.ranks) > 1:
                raise IntegrityError(f"request {request_id} lives on several data-parallel ranks")


def _request_id(event: WorkerEvent) -> str:
    """Of an event that concerns one request."""
    match event:
        case ServeRequested(request) | ReserveRequested(request) | PrefillRequested(request):
            return request.request_id
        case LinkLost(_, request_ids):
            return request_ids[0]
        case StepFinished() | StepFailed() | RowsDropped() | Tick():
            raise ValueError(f"a {type(event).__name__} does not concern one request")
        case _:
            return event.request_id
