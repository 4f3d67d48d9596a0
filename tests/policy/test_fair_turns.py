"""Turns: whoever brings little goes first, and nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.request import Request
from diptych.policy.fair_turns import MAX_TENANTS, FairTurns

CREDIT = 100.0
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}


def request(tenant: str) -> Request:
    return Request(request_id="r", prompt_token_ids=(), tenant=tenant, weight=WEIGHTS.get(tenant, 1.0))


class Worker:
    """Computes prompts in order of their turns, a step at a time."""

    def __init__(self, step: int = 10) -> None:
        self.turns = FairTurns(CREDIT)
        self.step_tokens = step
        self.waiting: list[tuple[float, int, str, float]] = []  # turn, number, tenant, tokens left
        self.computed: dict[str, float] = {}
        self.finished: list[int] = []
        self._number = 0

    def bring(self, tenant: str, tokens: int) -> int:
        self._number += 1
        self.waiting.append((self.turns.turn(request(tenant), tokens), self._number, tenant, tokens))
        return self._number

    def step(self) -> None:
        turn, number, tenant, left = min(self.waiting)
        self.waiting.remove((turn, number, tenant, left))
        done = min(left, self.step_tokens)
        self.computed[tenant] = self.computed.get(tenant, 0.0) + done
        positions = [turn - left / request(tenant).weight for turn, _, tenant, left in self.waiting]
        self.turns.reached(min([turn - (left - done) / request(tenant).weight, *positions]))
        if done < left:
            self.waiting.append((turn, number, tenant, left - done))
        else:
            self.finished.append(number)


def test_of_one_tenant_it_is_the_order_of_arrival() -> None:
    worker = Worker()
    for tokens in (50, 5, 500, 1):
        worker.bring("a", tokens)
    while worker.waiting:
        worker.step()
    assert worker.finished == [1, 2, 3, 4]


@pytest.mark.fault(56)
def test_who_stays_below_its_share_is_served_at_once() -> None:
    worker = Worker()
    flood = worker.bring("flood", 1000)
    for _ in range(50):
        worker.step()
    burst = [worker.bring("victim", 40) for _ in range(5)]
    for _ in range(20):
        worker.step()
    assert worker.finished == burst
    while worker.waiting:
        worker.step()
    assert worker.finished[-1] == flood


@pytest.mark.fault(56)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 200)), min_size=1, max_size=60), st.integers(1, 50))
def test_shares_of_those_that_always_wait_follow_their_weights(arrivals: list[tuple[str, int]], step: int) -> None:
    """They differ by one prompt of each at most, and a step."""
    worker = Worker(step)
    longest = dict.fromkeys(WEIGHTS, 0)
    for tenant, tokens in arrivals:
        longest[tenant] = max(longest[tenant], tokens)
        worker.bring(tenant, tokens)
    there = {tenant for tenant, _ in arrivals}
    while {tenant for _, _, tenant, _ in worker.waiting} == there:
        worker.step()
        for one in there:
            for other in there - {one}:
                shares = (worker.computed.get(tenant, 0.0) / WEIGHTS[tenant] for tenant in (one, other))
                bound = (longest[one] + step) / WEIGHTS[one] + (longest[other] + step) / WEIGHTS[other]
                assert abs(next(shares) - next(shares)) <= bound + 1e-6


@pytest.mark.fault(56)
@pytest.mark.fault(58)
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 300),
    st.lists(st.tuples(st.sampled_from("bcde"), st.integers(1, 120)), max_size=20),
    st.lists(st.lists(st.tuples(st.sampled_from("bcde"), st.integers(5, 120)), max_size=2), min_size=1, max_size=6),
)
def test_nobody_starves(tokens: int, before: list[tuple[str, int]], flood: list[list[tuple[str, int]]]) -> None:
    """However others go on, each of them gets no more before a prompt than its credit, what the prompt is long and
    one prompt of its own, besides what it is behind or ahead when that comes."""
    worker = Worker()
    for tenant, size in before:
        worker.bring(tenant, size)
    for _ in range(len(before) // 2):
        worker.step()
    mine = worker.bring("a", tokens)
    turn = next(turn for turn, number, _, _ in worker.waiting if number == mine)
    starts = {tenant: worker.turns.start(tenant) for tenant in "bcde"}
    pending = {tenant: sum(left for _, _, name, left in worker.waiting if name == tenant) for tenant in "bcde"}
    computed = dict(worker.computed)
    steps = 0
    while mine not in worker.finished:
        for tenant, size in flood[steps % len(flood)]:
            worker.bring(tenant, size)
        worker.step()
        steps += 1
    for tenant in "bcde":
        got = worker.computed.get(tenant, 0.0) - computed.get(tenant, 0.0)
        weight = request(tenant).weight
        assert got <= pending[tenant] + weight * max(0.0, turn - starts[tenant]) + 1e-6


def test_a_forgotten_tenant_has_its_whole_credit_and_memory_is_bounded() -> None:
    turns = FairTurns(CREDIT)
    for number in range(3 * MAX_TENANTS):
        turns.turn(request(str(number)), 1)
    assert len(turns._ends) == MAX_TENANTS
    assert turns.start("0") == -CREDIT
    assert turns.are_shared
    turns.reached(1000.0)
    assert (turns._ends, turns.are_shared, turns.start("new")) == ({}, False, 900.0)
    turns.reached(500.0)
    assert turns.start("new") == 900.0, "it never runs backwards"
    assert turns.is_behind(999.0)
    assert not turns.is_behind(1000.0)
