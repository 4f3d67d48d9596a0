"""Where a request goes: filter, score in seconds, pick a pair.

    split(p, d) = queue(p) + prefill(p, tokens p lacks) + exposed transfer + a decode step on d
    local(d)    = queue(d) + prefill(d, tokens d lacks) + harm(d)          + a decode step on d

`harm` is what a prefill does to the streams of a decode worker: each of them stands still while it
runs. On a dedicated decode worker it is never nothing, because keeping it free for streams that are
about to arrive is what it is for. So a short or mostly cached prompt is prefilled where it decodes, and
a long one is not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from diptych.core.fleet import Role, Route, WorkerId, WorkerState, WorkerView
from diptych.core.request import Preference
from diptych.policy.cost_model import CostModel

SAME_HOST = frozenset({"shm"})  # transports that need two workers to be on one host


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What the router has given a worker and not seen finished. Credited at dispatch, not when the
    worker reports it: otherwise everything that arrives in between goes to the same place."""

    prefill_tokens: int = 0  # of requests without a first token yet
    sequences: int = 0  # that decode there, or will


@dataclass(frozen=True, slots=True)
class Demand:
    """What routing needs to know of a request: its length and where its prefix is cached."""

    num_tokens: int
    cached_tokens: Mapping[WorkerId, int]
    prefer: Preference = Preference.AUTO

    def uncached(self, worker: WorkerId) -> int:
        """Tokens to compute on this worker; the last one always has to be."""
        return max(1, self.num_tokens - self.cached_tokens.get(worker, 0))


@dataclass(frozen=True, slots=True)
class ScoredRoute:
    route: Route
    seconds: float


class Routing:
    """The routing policy. Holds no state of its own."""

    def __init__(self, cost: CostModel | None = None, transports: Sequence[str] = ("shm", "tcp")) -> None:
        self._cost = cost or CostModel()
        self._transports = tuple(transports)  # in order of preference

    def choose(
        self,
        demand: Demand,
        workers: Sequence[WorkerView],
        loads: Mapping[WorkerId, WorkerLoad],
        avoid: Collection[tuple[WorkerId, WorkerId]] = (),
    ) -> ScoredRoute | None:
        """The best route, or None if no worker is ready. A wish that nobody can meet is not an error:
        without a pair, `split` is served locally. `avoid` are (prefill, decode) pairs not to be used."""
        ready = [worker for worker in workers if worker.state is WorkerState.READY]
        decoders = [worker for worker in ready if worker.role is not Role.PREFILL] or ready
        local = [self._local(demand, worker, loads) for worker in decoders]
        split: list[ScoredRoute] = []
        if demand.prefer is not Preference.LOCAL:
            prefillers = [worker for worker in ready if worker.role is Role.PREFILL]
            if not prefillers and demand.prefer is Preference.SPLIT:
                prefillers = ready
            backward = {(p.worker_id, d.worker_id) for p in prefillers for d in decoders if not _forward(p, d)}
            split = self._pairs(demand, prefillers, decoders, loads, backward.union(avoid))
        options = split if split and demand.prefer is Preference.SPLIT else local + split
        return min(options, key=lambda option: option.seconds, default=None)

    def onward(
        self,
        demand: Demand,
        source: WorkerView,
        workers: Sequence[WorkerView],
        loads: Mapping[WorkerId, WorkerLoad],
        avoid: Collection[tuple[WorkerId, WorkerId]] = (),
    ) -> ScoredRoute | None:
        """Where the worker that has a log's KV, and is about to leave, hands it over best."""
        others = [worker for worker in workers if worker.worker_id != source.worker_id]
        targets = [worker for worker in others if worker.role is not Role.PREFILL] or others
        options = self._pairs(demand, [source], targets, loads, avoid)
        return min(options, key=lambda option: option.seconds, default=None)

    def _pairs(
        self,
        demand: Demand,
        prefillers: Sequence[WorkerView],
        decoders: Sequence[WorkerView],
        loads: Mapping[WorkerId, WorkerLoad],
        avoid: Collection[tuple[WorkerId, WorkerId]],
    ) -> list[ScoredRoute]:
        pairs = []
        for prefill in prefillers:
            for decode in decoders:
                transport = self.transport(prefill, decode)
                if prefill.worker_id == decode.worker_id or (prefill.worker_id, decode.worker_id) in avoid:
                    continue
                if transport is not None:
                    seconds = self._split_seconds(demand, prefill, decode, loads)
                    pairs.append(ScoredRoute(Route(decode.worker_id, prefill.worker_id, transport), seconds))
        return pairs

    def transport(self, prefill: WorkerView, decode: WorkerView) -> str | None:
        """How pages go from one worker to another: the first of our transports that the two share, if any."""
        shared = set(prefill.transports) & set(decode.transports)
        if prefill.host != decode.host:
            shared -= SAME_HOST
        return next((name for name in self._transports if name in shared), None)

    def _local(self, demand: Demand, worker: WorkerView, loads: Mapping[WorkerId, WorkerLoad]) -> ScoredRoute:
        load = loads.get(worker.worker_id, WorkerLoad())
        prefill = self._cost.prefill_seconds(worker, demand.uncached(worker.worker_id))
        harm = prefill * self._cost.stall_weight * load.sequences
        if worker.role is Role.DECODE:
            harm = max(harm, prefill)
        seconds = (
            self._cost.prefill_seconds(worker, load.prefill_tokens)
            + prefill
            + harm
            + self._cost.decode_seconds(worker, load.sequences)
            + self._shortage_seconds(demand, worker)
        )
        return ScoredRoute(Route(worker.worker_id), seconds)

    def _split_seconds(
        self, demand: Demand, prefill: WorkerView, decode: WorkerView, loads: Mapping[WorkerId, WorkerLoad]
    ) -> float:
        queued = loads.get(prefill.worker_id, WorkerLoad()).prefill_tokens
        return (
            self._cost.prefill_seconds(prefill, queued + demand.uncached(prefill.worker_id))
            + self._cost.exposed_transfer_seconds(decode, demand.uncached(decode.worker_id))
            + self._cost.decode_seconds(decode, loads.get(decode.worker_id, WorkerLoad()).sequences)
            + self._shortage_seconds(demand, decode)
        )

    def _shortage_seconds(self, demand: Demand, worker: WorkerView) -> float:
        """Waiting for blocks: as long as decoding the missing tokens out of the way takes."""
        missing = demand.num_tokens - worker.blocks_free * worker.block_size
        return max(0, missing) * self._cost.decode_seconds(worker, 1)


_DOWNSTREAM = (Role.PREFILL, Role.MIXED, Role.DECODE)


def _forward(prefill: WorkerView, decode: WorkerView) -> bool:
    """KV flows one way through the fleet. Else two workers could each keep blocks for pages of the other, and so have
    none left to compute those: both would wait until a deadline."""
    source = (_DOWNSTREAM.index(prefill.role), prefill.worker_id)
    return source < (_DOWNSTREAM.index(decode.role), decode.worker_id)
