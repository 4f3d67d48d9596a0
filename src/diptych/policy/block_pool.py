"""Who holds which KV block of one worker: reference counts, the prefix cache, eviction.

Every block is in exactly one of three states:

    free    no reference, contents mean nothing
    used    one reference per owner (sequences that share a prefix, a writer not yet gone)
    cached  no reference, but its contents are known by their hash and wait to be reused or evicted

            allocate                      release, not registered
    free ------------> used -----------------------------------------> free
                        |  release, registered             take_cached
                        +--------------------> cached --------------------> used
                                                 |  allocate (evicts)
                                                 +--------------------> used
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Protocol

from diptych.core.blocks import BlockHash, BlockId


class Eviction(StrEnum):
    """Which cached block goes first."""

    LRU = "lru"  # the one unused for longest
    FIFO = "fifo"  # the one that entered the cache first, however often it was used since


class OutOfBlocks(Exception):
    """Fewer blocks are free or evictable than were asked for. Nothing was taken."""


class IntegrityError(Exception):
    """The books are wrong: a bug in whoever took or released the block that the message names."""


class BlockPool:
    """The blocks 0 .. num_blocks - 1 of one worker's KV memory.

    Every operation takes constant time per block (logarithmic for a FIFO eviction).
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, eviction: Eviction = Eviction.LRU, prefix_caching: bool = True
    ) -> None:
        if min(num_blocks, block_size) < 1:
            raise ValueError(f"a pool needs blocks and tokens per block: {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, BlockId] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is warm in the CPU's caches
        self._cached: _EvictionOrder = _LeastRecentlyUsed() if eviction is Eviction.LRU else _FirstInFirstOut()
        self._stored: dict[BlockHash, None] = {}
        self._evicted: dict[BlockHash, None] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def match(self, hashes: Sequence[BlockHash]) -> list[BlockId]:
        """Blocks of the longest leading run of `hashes` that is present. Takes no reference."""
        blocks: list[BlockId] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_cached(self, blocks: Iterable[BlockId]) -> int:
        """How many of `blocks` are cached, that is, by how much taking them would lower `num_free`."""
        return sum(block in self._cached for block in blocks)

    def take_cached(self, blocks: Sequence[BlockId]) -> None:
        """Add a reference to each of `blocks`, as returned by `match`.

        Raises IntegrityError, having taken nothing, if one of them is free.
        """
        for block in blocks:
            if self._references[block] == 0 and block not in self._cached:
                raise IntegrityError(f"block {block} is free, so its contents cannot be shared")
        for block in blocks:
            if self._references[block] == 0:
                self._cached.remove(block)
            self._references[block] += 1

    def allocate(self, count: int) -> list[BlockId]:
        """Take `count` blocks with one reference each; free ones first, then cached ones by the eviction policy.

        Their bytes are whatever was there before. They ascend, so that neighbours in memory are neighbours in
        the block table, and move as one range. Raises OutOfBlocks, having taken nothing.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_free} of {self.num_blocks} are free or evictable")
        blocks = sorted(self._free.pop() if self._free else self._evict() for _ in range(count))
        for block in blocks:
            self._references[block] = 1
        return blocks

    def release(self, blocks: Iterable[BlockId]) -> None:
        """Drop one reference of each. Blocks without any left become cached if registered, else free.

        Release a block table in reverse: then a prefix outlives its continuations, and what is left
        of it can still be matched. Raises IntegrityError at a block without a reference.
        """
        for block in blocks:
            if self._references[block] == 0:
                raise IntegrityError(f"block {block} is released by somebody who does not hold it")
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if self._hash_of[block] is None:
                self._free.append(block)
            else:
                self._cached.add(block)

    def register(self, block: BlockId, block_hash: BlockHash) -> None:
        """The contents of `block` are final from now on and known by `block_hash`.

        If another block is already known by it, that one stays the known one. Raises IntegrityError
        if nobody holds the block, or if it is known by another hash.
        """
        if not self.prefix_caching:
            return
        if self._references[block] == 0:
            raise IntegrityError(f"block {block} is registered by somebody who does not hold it")
        if self._hash_of[block] not in (None, block_hash):
            raise IntegrityError(f"block {block} is registered twice, with different contents")
        if block_hash in self._block_of:
            return
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash
        _note(block_hash, self._stored, unless_in=self._evicted)

    def drain_events(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Net changes since the last call: hashes (stored, evicted), disjoint. For the router's prefix index."""
        stored, evicted = list(self._stored), list(self._evicted)
        self._stored.clear()
        self._evicted.clear()
        return stored, evicted

    def clear_cache(self) -> None:
        """Forget all contents: cached blocks become free, used ones stay with their owners but unknown."""
        while self._cached:
            self._free.append(self._cached.pop())
        self._cached = type(self._cached)()
        for block_hash in list(self._block_of):
            self._forget(block_hash)

    def check_integrity(self, owners: Mapping[str, Sequence[BlockId]] | None = None) -> None:
        """Raise IntegrityError, naming the block, unless the books are consistent.

        Every block is in exactly one state, hashes and blocks map one to one, and, if `owners` is
        given (all of them, each with the blocks it holds), references equal what the owners hold.
        """
        times_free = Counter(self._free)
        for block in range(self.num_blocks):
            states = times_free[block] + (block in self._cached) + (self._references[block] > 0)
            if states != 1:
                raise IntegrityError(f"block {block} is in {states} states")
            block_hash = self._hash_of[block]
            if times_free[block] and block_hash is not None:
                raise IntegrityError(f"block {block} is free and registered")
            if block in self._cached and block_hash is None:
                raise IntegrityError(f"block {block} is cached without a hash")
            if block_hash is not None and self._block_of.get(block_hash) != block:
                raise IntegrityError(f"block {block} is not what its hash leads to")
        if len(self._block_of) != sum(block_hash is not None for block_hash in self._hash_of):
            raise IntegrityError("a hash leads to a block that is not registered")
        if owners is not None:
            self._check_owners(owners)

    def _check_owners(self, owners: Mapping[str, Sequence[BlockId]]) -> None:
        held = Counter(block for blocks in owners.values() for block in blocks)
        for block, references in enumerate(self._references):
            if held[block] != references:
                names = [name for name, blocks in owners.items() if block in blocks]
                raise IntegrityError(f"block {block} has {references} references; its owners are {names}")

    def _evict(self) -> BlockId:
        """Take the next block by the eviction policy out of the cache."""
        block = self._cached.pop()
        block_hash = self._hash_of[block]
        if block_hash is None:
            raise IntegrityError(f"block {block} is cached without a hash")
        self._forget(block_hash)
        return block

    def _forget(self, block_hash: BlockHash) -> None:
        self._hash_of[self._block_of.pop(block_hash)] = None
        _note(block_hash, self._evicted, unless_in=self._stored)


def _note(block_hash: BlockHash, events: dict[BlockHash, None], *, unless_in: dict[BlockHash, None]) -> None:
    """Record an event, or cancel the opposite one that nobody has heard of yet."""
    if block_hash in unless_in:
        del unless_in[block_hash]
    else:
        events[block_hash] = None


class _EvictionOrder(Protocol):
    """The cached blocks, in the order in which they are to be evicted."""

    def __len__(self) -> int: ...
    def __contains__(self, block: object) -> bool: ...
    def add(self, block: BlockId) -> None: ...
    def remove(self, block: BlockId) -> None: ...
    def pop(self) -> BlockId: ...


class _LeastRecentlyUsed:
    """A block that comes back takes its place behind all others."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[BlockId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: object) -> bool:
        return block in self._blocks

    def add(self, block: BlockId) -> None:
        self._blocks[block] = None

    def remove(self, block: BlockId) -> None:
        del self._blocks[block]

    def pop(self) -> BlockId:
        return self._blocks.popitem(last=False)[0]


class _FirstInFirstOut:
    """A block that comes back takes the place that it had: its turn is kept until it is evicted.

    A removed block stays in the heap and is skipped when its turn comes, so the heap never holds more
    than one entry per block.
    """

    def __init__(self) -> None:
        self._blocks: set[BlockId] = set()
        self._turn: dict[BlockId, int] = {}
        self._heap: list[tuple[int, BlockId]] = []
        self._queued: set[BlockId] = set()
        self._next_turn = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: object) -> bool:
        return block in self._blocks

    def add(self, block: BlockId) -> None:
        self._blocks.add(block)
        if block not in self._turn:
            self._turn[block] = self._next_turn
            self._next_turn += 1
        if block not in self._queued:
            self._queued.add(block)
            heapq.heappush(self._heap, (self._turn[block], block))

    def remove(self, block: BlockId) -> None:
        self._blocks.remove(block)

    def pop(self) -> BlockId:
        while True:
            _, block = heapq.heappop(self._heap)
            self._queued.remove(block)
            if block in self._blocks:
                self._blocks.remove(block)
                del self._turn[block]
                return block
