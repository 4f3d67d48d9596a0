"""Whether the fleet has room for one more request, from what workers report and what is on its way to them.

Workers have queues of their own, but order in those is order of arrival. So they are only ever given a little
more than keeps them busy; the rest waits in the fair queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from diptych.core.blocks import blocks_for
from diptych.core.fleet import Role, WorkerId, WorkerState, WorkerView
from diptych.policy.cost_model import CostModel


@dataclass(frozen=True, slots=True)
class Pending:
    """A request that was given to workers and has no first token yet: where, and the tokens to compute."""

    prefiller: WorkerId
    decoder: WorkerId
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomLimits:
    """What a worker is given ahead.

    Attributes:
        backlog_seconds: of prefill, by its measured rate; a tenant whose turn comes next waits for that long.
        backlog_tokens: of prefill, however long they take: short prompts share steps, which pays only if there
            are enough of them.
        max_pending: prompts without a first token.
        max_waiting: sequences that a decode worker says wait there.
    """

    backlog_seconds: float = 0.25
    backlog_tokens: int = 1024
    max_pending: int = 64
    max_waiting: int = 4


class Room:
    """The fleet at one moment.

    Attributes:
        prefill_rate: tokens/s of all that prefill; 0 if nobody can.
        kv_tokens: what the KV caches of all that decode hold.
        pending_tokens: to compute until every dispatched request has its first token.
    """

    def __init__(self, workers: Iterable[WorkerView], pending: Iterable[Pending], limits: RoomLimits) -> None:
        ready = [worker for worker in workers if worker.state is WorkerState.READY]
        self._prefillers = [worker for worker in ready if worker.role is not Role.DECODE] or ready
        self._decoders = [worker for worker in ready if worker.role is not Role.PREFILL] or ready
        self._limits = limits
        self._cost = CostModel()
        self._backlog: Counter[WorkerId] = Counter()
        self._prompts: Counter[WorkerId] = Counter()
        self._promised: Counter[WorkerId] = Counter()
        for request in pending:
            self._backlog[request.prefiller] += request.tokens
            self._prompts[request.prefiller] += 1
            self._promised[request.decoder] += request.tokens
        self.pending_tokens = self._backlog.total()
        self.prefill_rate = sum(1 / self._cost.prefill_seconds(worker, 1) for worker in self._prefillers)
        self.kv_tokens = sum(worker.num_blocks * worker.block_size for worker in self._decoders)

    def __bool__(self) -> bool:
        """Somebody is ready to serve."""
        return bool(self._decoders)

    def fits(self, num_tokens: int) -> bool:
        """Whether a log of that many tokens can be started now. An idle worker takes whatever comes."""
        return any(map(self._can_prefill, self._prefillers)) and any(
            self._can_decode(worker, num_tokens) for worker in self._decoders
        )

    def _can_prefill(self, worker: WorkerView) -> bool:
        if self._prompts[worker.worker_id] >= self._limits.max_pending:
            return False
        tokens = self._backlog[worker.worker_id]
        seconds = self._cost.prefill_seconds(worker, tokens)
        return tokens < self._limits.backlog_tokens or seconds < self._limits.backlog_seconds

    def _can_decode(self, worker: WorkerView, num_tokens: int) -> bool:
        promised = self._promised[worker.worker_id]
        if promised == 0 and worker.stats.blocks_used == 0:
            return True
        needed = blocks_for(num_tokens + promised, worker.block_size)
        return worker.stats.waiting < self._limits.max_waiting and needed <= worker.blocks_free
