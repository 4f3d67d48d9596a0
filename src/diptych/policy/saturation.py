"""Whether the fleet has room for one more request, from what workers report and what is on its way to them.

Workers have queues of their own. They are only ever given a little more of each tenant's prompts than keeps them busy
with its share; the rest waits in the fair queue, where nothing is decided yet.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from diptych.core.blocks import blocks_for
from diptych.core.fleet import Role, Route, WorkerId, WorkerState, WorkerView
from diptych.policy.backlog import Backlog, Prompt
from diptych.policy.cost_model import CostModel


@dataclass(frozen=True, slots=True)
class Pending:
    """A request that was given to workers and has no first token yet: where, and what there is to compute."""

    prefiller: WorkerId
    decoder: WorkerId
    prompt: Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomLimits:
    """What a worker is given ahead.

    Attributes:
        backlog_seconds: of prefill before a tenant's next prompt is begun, by its measured rate.
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
    """

    def __init__(self, workers: Iterable[WorkerView], pending: Iterable[Pending], limits: RoomLimits) -> None:
        ready = [worker for worker in workers if worker.state is WorkerState.READY]
        prefillers = [worker for worker in ready if worker.role is not Role.DECODE] or ready
        decoders = [worker for worker in ready if worker.role is not Role.PREFILL] or ready
        self._workers = {worker.worker_id: worker for worker in ready}
        self._limits = limits
        self._cost = CostModel()
        self._prefillers = prefillers
        self._backlogs: defaultdict[WorkerId, Backlog] = defaultdict(Backlog)
        self._promised: Counter[WorkerId] = Counter()
        for request in pending:
            self._backlogs[request.prefiller].add(request.prompt)
            self._promised[request.decoder] += request.prompt.tokens
        self.prefill_rate = sum(1 / self._cost.prefill_seconds(worker, 1) for worker in prefillers)
        self.kv_tokens = sum(worker.num_blocks * worker.block_size for worker in decoders)

    def __bool__(self) -> bool:
        """Somebody is ready to serve."""
        return bool(self._workers)

    def busy_seconds(self, prompt: Prompt) -> float:
        """For how long others are computed until this prompt is done, where that is least."""

        def wait(worker: WorkerView) -> float:
            return self._cost.prefill_seconds(worker, self._backlogs[worker.worker_id].ahead_of(prompt))

        return min(map(wait, self._prefillers), default=0.0)

    def has_enough(self, route: Route, prompt: Prompt) -> bool:
        """Whether the prefilling worker has enough of this tenant's prompts already to be busy with its share."""
        prefiller = self._workers[route.prefill or route.decode]
        ahead = self._backlogs[prefiller.worker_id].own_before(prompt)
        seconds = self._cost.prefill_seconds(prefiller, ahead)
        return ahead >= self._limits.backlog_tokens and seconds >= self._limits.backlog_seconds

    def takes(self, route: Route, prompt: Prompt) -> bool:
        """Whether a prompt can be started there now."""
        return self.fits(route, prompt) and not self.has_enough(route, prompt)

    def fits(self, route: Route, prompt: Prompt) -> bool:
        """Whether workers can take a prompt at all now. An idle worker takes whatever comes."""
        prefiller, decoder = self._workers[route.prefill or route.decode], self._workers[route.decode]
        num_prompts = self._backlogs[prefiller.worker_id].num_prompts
        return num_prompts < self._limits.max_pending and self._can_decode(decoder, prompt.tokens)

    def _can_decode(self, worker: WorkerView, num_tokens: int) -> bool:
        promised = self._promised[worker.worker_id]
        if promised == 0 and worker.stats.blocks_used == 0:
            return True
        needed = blocks_for(num_tokens + promised, worker.block_size)
        return worker.stats.waiting < self._limits.max_waiting and needed <= worker.blocks_free
