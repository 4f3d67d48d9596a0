"""Whether the fleet has room for one more request, from what workers report and what is on its way to them.

Workers have queues of their own, but order in those is order of arrival. So they are only ever given a little
more than keeps them busy; the rest waits in the fair queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from diptych.core.blocks import blocks_for
from diptych.core.fleet import Role, Route, WorkerId, WorkerState, WorkerView
from diptych.policy.batching import SHORT
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
            are enough of them. The longest prompt does not count for those much shorter, since it shares its steps
            with them (`policy.batching`).
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
        busy_seconds: until the first of those that prefill has done what it was given.
    """

    def __init__(self, workers: Iterable[WorkerView], pending: Iterable[Pending], limits: RoomLimits) -> None:
        ready = [worker for worker in workers if worker.state is WorkerState.READY]
        prefillers = [worker for worker in ready if worker.role is not Role.DECODE] or ready
        decoders = [worker for worker in ready if worker.role is not Role.PREFILL] or ready
        self._workers = {worker.worker_id: worker for worker in ready}
        self._limits = limits
        self._cost = CostModel()
        self._backlog: Counter[WorkerId] = Counter()
        self._prompts: Counter[WorkerId] = Counter()
        self._longest: Counter[WorkerId] = Counter()
        self._promised: Counter[WorkerId] = Counter()
        for request in pending:
            self._backlog[request.prefiller] += request.tokens
            self._prompts[request.prefiller] += 1
            self._longest[request.prefiller] = max(self._longest[request.prefiller], request.tokens)
            self._promised[request.decoder] += request.tokens
        self.busy_seconds = min(map(self._backlog_seconds, prefillers), default=0.0)
        self.prefill_rate = sum(1 / self._cost.prefill_seconds(worker, 1) for worker in prefillers)
        self.kv_tokens = sum(worker.num_blocks * worker.block_size for worker in decoders)

    def __bool__(self) -> bool:
        """Somebody is ready to serve."""
        return bool(self._workers)

    def fits(self, route: Route, num_tokens: int) -> bool:
        """Whether a log of that many tokens can be started there now. An idle worker takes whatever comes."""
        prefiller, decoder = self._workers[route.prefill or route.decode], self._workers[route.decode]
        return self._can_prefill(prefiller, num_tokens) and self._can_decode(decoder, num_tokens)

    def _can_prefill(self, worker: WorkerView, num_tokens: int) -> bool:
        if self._prompts[worker.worker_id] >= self._limits.max_pending:
            return False
        backlog, longest = self._backlog[worker.worker_id], self._longest[worker.worker_id]
        if num_tokens * SHORT <= longest:
            backlog -= longest
        seconds = self._cost.prefill_seconds(worker, backlog)
        return backlog < self._limits.backlog_tokens or seconds < self._limits.backlog_seconds

    def _backlog_seconds(self, worker: WorkerView) -> float:
        return self._cost.prefill_seconds(worker, self._backlog[worker.worker_id])

    def _can_decode(self, worker: WorkerView, num_tokens: int) -> bool:
        promised = self._promised[worker.worker_id]
        if promised == 0 and worker.stats.blocks_used == 0:
            return True
        needed = blocks_for(num_tokens + promised, worker.block_size)
        return worker.stats.waiting < self._limits.max_waiting and needed <= worker.blocks_free
