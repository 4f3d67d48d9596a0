from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from diptych.core.blocks import BlockHash
from diptych.policy.prefix_index import PrefixIndex

HASHES = [bytes([number]) * 16 for number in range(6)]
hashes = st.lists(st.sampled_from(HASHES), max_size=6)
workers = st.sampled_from(["p0", "p1", "d0"])


class IndexMachine(RuleBasedStateMachine):
    """Against a set of pairs; the capacity is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(capacity=18)
        self.pairs: set[tuple[str, BlockHash]] = set()

    @rule(worker=workers, hashes=hashes)
    def store(self, worker: str, hashes: list[BlockHash]) -> None:
        self.index.store(worker, hashes)
        self.pairs |= {(worker, block_hash) for block_hash in hashes}

    @rule(worker=workers, hashes=hashes)
    def evict(self, worker: str, hashes: list[BlockHash]) -> None:
        self.index.evict(worker, hashes)
        self.pairs -= {(worker, block_hash) for block_hash in hashes}

    @rule(worker=workers)
    def forget_worker(self, worker: str) -> None:
        self.index.forget_worker(worker)
        self.pairs = {pair for pair in self.pairs if pair[0] != worker}

    @rule(hashes=hashes)
    def match(self, hashes: list[BlockHash]) -> None:
        wanted = {}
        for worker in {worker for worker, _ in self.pairs}:
            held = [(worker, block_hash) in self.pairs for block_hash in hashes]
            run = held.index(False) if False in held else len(held)
            if run:
                wanted[worker] = run
        assert self.index.match(hashes) == wanted

    @invariant()
    def size_agrees(self) -> None:
        assert len(self.index) == len(self.pairs)
        assert self.index.num_evictions == 0


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(stores=st.lists(st.tuples(workers, hashes), max_size=20), capacity=st.integers(1, 5))
def test_size_is_bounded_and_losses_are_counted(stores: list[tuple[str, list[BlockHash]]], capacity: int) -> None:
    index = PrefixIndex(capacity)
    for worker, stored in stores:
        before, evictions = len(index), index.num_evictions
        fresh = {block_hash for block_hash in stored if worker not in index.match([block_hash])}
        index.store(worker, stored)
        assert len(index) <= capacity
        assert len(index) == before + len(fresh) - (index.num_evictions - evictions)
    for worker in ("p0", "p1", "d0"):
        index.forget_worker(worker)
    assert len(index) == 0


def test_least_recently_matched_goes_first_and_tails_before_heads() -> None:
    index = PrefixIndex(capacity=4)
    index.store("p0", HASHES[:4])
    assert index.match(HASHES[:3]) == {"p0": 3}
    index.store("p0", HASHES[4:5])
    assert index.match(HASHES[3:4]) == {}
    index.store("p0", HASHES[5:6])
    assert index.match(HASHES[:3]) == {"p0": 2}
    assert index.num_evictions == 2


def test_capacity_is_positive() -> None:
    with pytest.raises(ValueError, match="at least one entry"):
        PrefixIndex(0)
