"""The block pool against a slow, obvious model of it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from diptych.core.blocks import BlockHash, BlockId
from diptych.policy.block_pool import BlockPool, Eviction, IntegrityError, OutOfBlocks

HASHES = [bytes([number]) * 16 for number in range(12)]


class PoolMachine(RuleBasedStateMachine):
    """`cached` is the model's eviction queue, `turn` the place in it that FIFO keeps for a block."""

    tables = Bundle("tables")

    @initialize(num_blocks=st.integers(1, 8), eviction=st.sampled_from(Eviction))
    def create(self, num_blocks: int, eviction: Eviction) -> None:
        self.pool = BlockPool(num_blocks, 16, eviction=eviction)
        self.eviction = eviction
        self.references: Counter[BlockId] = Counter()
        self.hash_of: dict[BlockId, BlockHash] = {}
        self.cached: list[BlockId] = []
        self.turn: dict[BlockId, int] = {}
        self.owners: dict[str, list[BlockId]] = {}
        self.known_to_router: set[BlockHash] = set()
        self.count = 0

    def new_owner(self, blocks: list[BlockId]) -> str:
        self.count += 1
        self.owners[f"owner{self.count}"] = blocks
        self.references.update(blocks)
        return f"owner{self.count}"

    @rule(target=tables, count=st.integers(0, 9))
    def allocate(self, count: int) -> object:
        free = self.pool.num_blocks - len(+self.references) - len(self.cached)
        if count > free + len(self.cached):
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            return multiple()
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not any(self.references[block] for block in blocks)
        to_evict = max(0, count - free)
        assert set(self.cached) & set(blocks) == set(self.cached[:to_evict])
        for block in self.cached[:to_evict]:
            del self.hash_of[block], self.turn[block]
        self.cached = self.cached[to_evict:]
        return self.new_owner(blocks)

    @rule(target=tables, hashes=st.lists(st.sampled_from(HASHES), max_size=4, unique=True))
    def share(self, hashes: list[BlockHash]) -> object:
        block_of = {block_hash: block for block, block_hash in self.hash_of.items()}
        present = [block_of.get(block_hash) for block_hash in hashes]
        run = present[: present.index(None)] if None in present else present
        blocks = self.pool.match(hashes)
        assert blocks == run
        assert self.pool.count_cached(blocks) == len(set(blocks) & set(self.cached))
        self.pool.take_cached(blocks)
        self.cached = [block for block in self.cached if block not in blocks]
        return self.new_owner(blocks)

    @rule(owner=tables, index=st.integers(0, 8), block_hash=st.sampled_from(HASHES))
    def register(self, owner: str, index: int, block_hash: BlockHash) -> None:
        if index >= len(self.owners.get(owner, [])):
            return
        block = self.owners[owner][index]
        if self.hash_of.get(block, block_hash) != block_hash:
            with pytest.raises(IntegrityError, match=f"block {block} "):
                self.pool.register(block, block_hash)
            return
        self.pool.register(block, block_hash)
        if block_hash not in self.hash_of.values():
            self.hash_of[block] = block_hash

    @rule(owner=consumes(tables))
    def release(self, owner: str) -> None:
        blocks = self.owners.pop(owner)
        self.pool.release(reversed(blocks))
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0 and block in self.hash_of:
                self.count += 1
                self.turn.setdefault(block, self.count)
                self.cached.append(block)
        if self.eviction is Eviction.FIFO:
            self.cached.sort(key=self.turn.__getitem__)

    @rule()
    def drain_events(self) -> None:
        stored, evicted = self.pool.drain_events()
        assert self.known_to_router.isdisjoint(stored)
        assert self.known_to_router.issuperset(evicted)
        self.known_to_router = (self.known_to_router - set(evicted)) | set(stored)
        assert self.known_to_router == set(self.hash_of.values())

    @rule()
    def clear_cache(self) -> None:
        self.pool.clear_cache()
        self.hash_of, self.cached, self.turn = {}, [], {}

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity(self.owners)
        assert self.pool.num_used == len(+self.references)
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_free == self.pool.num_blocks - self.pool.num_used


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def cached_pool(eviction: Eviction) -> BlockPool:
    """Three blocks, all cached, block i under HASHES[i], in this order."""
    pool = BlockPool(3, 16, eviction=eviction)
    for block, block_hash in zip(pool.allocate(3), HASHES, strict=False):
        pool.register(block, block_hash)
        pool.release([block])
    return pool


@pytest.mark.parametrize(("eviction", "victim"), [(Eviction.LRU, 1), (Eviction.FIFO, 0)])
def test_only_lru_spares_a_block_that_was_used_again(eviction: Eviction, victim: int) -> None:
    pool = cached_pool(eviction)
    pool.take_cached([0])
    pool.release([0])
    assert pool.allocate(1) == [victim]


def test_a_table_released_in_reverse_loses_its_tail_first() -> None:
    pool = BlockPool(3, 16)
    table = pool.allocate(3)
    for block, block_hash in zip(table, HASHES, strict=False):
        pool.register(block, block_hash)
    pool.release(reversed(table))
    pool.allocate(1)
    assert pool.match(HASHES[:3]) == table[:2]


def test_equal_contents_are_known_once() -> None:
    pool = BlockPool(2, 16)
    first, second = pool.allocate(2)
    pool.register(first, HASHES[0])
    pool.register(second, HASHES[0])
    assert pool.match(HASHES[:1]) == [first]
    pool.release([second])
    assert (pool.num_cached, pool.num_free) == (0, 1)


def test_without_prefix_caching_nothing_is_kept() -> None:
    pool = BlockPool(1, 16, prefix_caching=False)
    table = pool.allocate(1)
    pool.register(table[0], HASHES[0])
    assert pool.match(HASHES[:1]) == []
    pool.release(table)
    assert (pool.num_cached, pool.drain_events()) == (0, ([], []))


def test_what_nobody_heard_of_is_not_reported() -> None:
    pool = cached_pool(Eviction.LRU)
    pool.allocate(3)
    assert pool.drain_events() == ([], [])


def test_books_cannot_be_overdrawn() -> None:
    pool = BlockPool(2, 16)
    [block] = pool.allocate(1)
    pool.release([block])
    with pytest.raises(IntegrityError, match=f"block {block} "):
        pool.release([block])
    with pytest.raises(IntegrityError, match=f"block {block} "):
        pool.take_cached([block])
    with pytest.raises(IntegrityError, match=f"block {block} "):
        pool.register(block, HASHES[0])
    pool.check_integrity({})


def test_integrity_check_names_block_and_owners() -> None:
    pool = BlockPool(2, 16)
    [block] = pool.allocate(1)
    with pytest.raises(IntegrityError, match=rf"block {block} has 1 references; its owners are \['a', 'b'\]"):
        pool.check_integrity({"a": [block], "b": [block]})
    with pytest.raises(IntegrityError, match=rf"block {block} has 1 references; its owners are \[\]"):
        pool.check_integrity({})


@pytest.mark.parametrize("size", [(0, 16), (1, 0)])
def test_empty_pools_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a pool needs blocks"):
        BlockPool(*size)


def test_blocks_of_one_allocation_ascend() -> None:
    """Neighbours in memory then move as one range, also when they come from eviction, last block first."""
    pool = BlockPool(8, 4)
    blocks = pool.allocate(8)
    for block in blocks:
        pool.register(block, bytes([block]) * 16)
    pool.release(reversed(blocks))
    assert pool.allocate(5) == [3, 4, 5, 6, 7]
