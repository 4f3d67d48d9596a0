"""Which worker holds which KV blocks, as far as the router knows.

A cache of hints: workers tell what they stored and evicted (`BlockPool.drain_events`). A hint that
was dropped or is out of date costs time, never correctness; the worker's own pool decides.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from diptych.core.blocks import BlockHash
from diptych.core.fleet import WorkerId


class PrefixIndex:
    """Holders of block hashes, at most `capacity` (worker, hash) pairs.

    Beyond that the hash that was neither stored nor matched for longest goes; `num_evictions` counts
    the pairs dropped so.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a prefix index needs room for at least one entry, not {capacity}")
        self.capacity = capacity
        self.num_evictions = 0
        self._holders: OrderedDict[BlockHash, set[WorkerId]] = OrderedDict()
        self._held: dict[WorkerId, set[BlockHash]] = {}
        self._num_pairs = 0

    def __len__(self) -> int:
        return self._num_pairs

    def store(self, worker: WorkerId, hashes: Iterable[BlockHash]) -> None:
        """`worker` holds these blocks from now on."""
        for block_hash in hashes:
            holders = self._holders.setdefault(block_hash, set())
            self._holders.move_to_end(block_hash)
            if worker not in holders:
                holders.add(worker)
                self._held.setdefault(worker, set()).add(block_hash)
                self._num_pairs += 1
        while self._num_pairs > self.capacity:
            oldest = next(iter(self._holders))
            self.num_evictions += len(self._holders[oldest])
            for holder in tuple(self._holders[oldest]):
                self._drop(holder, oldest)

    def evict(self, worker: WorkerId, hashes: Iterable[BlockHash]) -> None:
        """`worker` holds these blocks no longer. Unknown ones are ignored."""
        for block_hash in hashes:
            if worker in self._holders.get(block_hash, ()):
                self._drop(worker, block_hash)

    def forget_worker(self, worker: WorkerId) -> None:
        """`worker` is gone, or came back with empty memory."""
        for block_hash in tuple(self._held.get(worker, ())):
            self._drop(worker, block_hash)
        self._held.pop(worker, None)

    def match(self, hashes: Sequence[BlockHash]) -> dict[WorkerId, int]:
        """How many leading `hashes` each worker holds; workers without the first are left out."""
        runs: dict[WorkerId, int] = {}
        for depth, block_hash in enumerate(hashes):
            holders = [worker for worker in self._holders.get(block_hash, ()) if runs.get(worker, 0) == depth]
            if not holders:
                break
            runs.update(dict.fromkeys(holders, depth + 1))
        for block_hash in reversed(hashes[: max(runs.values(), default=0)]):  # a prefix outlives its continuations
            self._holders.move_to_end(block_hash)
        return runs

    def _drop(self, worker: WorkerId, block_hash: BlockHash) -> None:
        holders = self._holders[block_hash]
        holders.remove(worker)
        if not holders:
            del self._holders[block_hash]
        held = self._held[worker]
        held.remove(block_hash)
        if not held:
            del self._held[worker]
        self._num_pairs -= 1
