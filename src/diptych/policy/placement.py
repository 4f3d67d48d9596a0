"""Where a log is begun or continued: the router's view of the fleet, and routing asked with it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from diptych.core.blocks import BlockHash, block_hashes
from diptych.core.fleet import Route, WorkerId, WorkerState, WorkerView
from diptych.core.request import Preference
from diptych.policy.live_request import LiveRequest, Pair
from diptych.policy.prefix_index import PrefixIndex
from diptych.policy.routing import Demand, Routing, WorkerLoad


@dataclass(frozen=True, slots=True)
class Place:
    """A route, and how many tokens there are to compute on its prefilling worker."""

    route: Route
    prefill_tokens: int


@dataclass(frozen=True, slots=True)
class Avoid:
    """Whom not to use."""

    workers: Collection[WorkerId] = ()
    pairs: Collection[Pair] = ()


class Placement:
    """Workers, what their caches hold, and the choice among them."""

    def __init__(self, routing: Routing, index: PrefixIndex) -> None:
        self.workers: dict[WorkerId, WorkerView] = {}
        self.index = index
        self._routing = routing

    def ready(self) -> list[WorkerView]:
        return [worker for worker in self.workers.values() if worker.state is WorkerState.READY]

    def transport(self, prefill: WorkerView, decode: WorkerView) -> str | None:
        """How pages would go from one worker to another, if at all."""
        return self._routing.transport(prefill, decode)

    def place(self, live: LiveRequest, loads: dict[WorkerId, WorkerLoad], avoid: Avoid) -> Place | None:
        """Where a log is continued best; None if nobody may be used."""
        candidates = [worker for worker in self.ready() if worker.worker_id not in avoid.workers]
        if not candidates:
            return None
        demand = self._demand(live, live.request.prefer)
        choice = self._routing.choose(demand, candidates, loads, avoid.pairs)
        if choice is None:
            return None
        return Place(choice.route, demand.uncached(choice.route.prefill or choice.route.decode))

    def onward(
        self, live: LiveRequest, source: WorkerView, loads: dict[WorkerId, WorkerLoad], avoid: Avoid
    ) -> Place | None:
        """Where a worker that has all KV of a log can hand it over to; None if nobody may take it."""
        candidates = [worker for worker in self.ready() if worker.worker_id not in avoid.workers]
        demand = self._demand(live, Preference.SPLIT)
        choice = self._routing.onward(demand, source, candidates, loads, avoid.pairs)
        return None if choice is None else Place(choice.route, demand.uncached(source.worker_id))

    def _demand(self, live: LiveRequest, prefer: Preference) -> Demand:
        return Demand(live.num_tokens, self._cached_tokens(live), prefer)

    def _cached_tokens(self, live: LiveRequest) -> dict[WorkerId, int]:
        """Leading tokens of a log that each worker has in its prefix cache, as far as anybody has said."""
        log, salt = live.log, live.request.cache_salt
        cached: dict[WorkerId, int] = {}
        for size in {worker.block_size for worker in self.workers.values()}:
            matches = self.index.match(_block_hashes(log, size, salt))
            for worker_id, worker in self.workers.items():
                blocks = max(matches.get(worker_id, 0), live.kv_at.get(worker_id, 0) // size)
                if worker.block_size == size and blocks:
                    cached[worker_id] = blocks * size
        return cached


def loads_of(requests: Iterable[LiveRequest]) -> dict[WorkerId, WorkerLoad]:
    """What each worker has been given and not finished."""
    tokens: dict[WorkerId, int] = {}
    sequences: dict[WorkerId, int] = {}
    for live in requests:
        if live.workers and live.route is not None:
            prefiller = live.route.prefill or live.route.decode
            tokens[prefiller] = tokens.get(prefiller, 0) + live.prefill_tokens
            sequences[live.route.decode] = sequences.get(live.route.decode, 0) + 1
    return {worker: WorkerLoad(tokens.get(worker, 0), sequences.get(worker, 0)) for worker in {*tokens, *sequences}}


@lru_cache(maxsize=8)
def _block_hashes(log: tuple[int, ...], block_size: int, salt: str) -> list[BlockHash]:
    """Those of a request whose turn it is are asked for again and again until there is room."""
    return block_hashes(log, block_size, salt)
