"""Shares, order and bounds of the fair queue."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.request import Request, SamplingParams
from diptych.policy.fair_queue import MAX_IDLE_TENANTS, FairQueue

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}
AGING = 10.0


def queue() -> FairQueue:
    return FairQueue(lambda tenant: WEIGHTS.get(tenant, 1.0), AGING)


def request(number: int, tenant: str = "a", cost: int = 2, priority: int = 0) -> Request:
    sampling = SamplingParams(max_tokens=cost - 1)
    return Request(request_id=f"r{number}", prompt_token_ids=(1,), tenant=tenant, priority=priority, sampling=sampling)


def drain(waiting: FairQueue) -> list[str]:
    """Take everything in order of turn."""
    order = []
    while (first := waiting.first()) is not None:
        order.append(waiting.take(first.request_id).request_id)
    return order


@pytest.mark.fault(56)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(2, 50)), min_size=1, max_size=80))
def test_shares_of_backlogged_tenants_follow_their_weights(arrivals: list[tuple[str, int]]) -> None:
    """Goyal et al., theorem 1: over any time in which both wait, normalized service differs by at most one
    request of each."""
    waiting = queue()
    for number, (tenant, cost) in enumerate(arrivals):
        waiting.push(request(number, tenant, cost), 0.0)
    largest = {tenant: max((cost for name, cost in arrivals if name == tenant), default=0) for tenant in WEIGHTS}
    served = dict.fromkeys(WEIGHTS, 0.0)
    backlogged = set(waiting.backlogged())
    while (first := waiting.first()) is not None and set(waiting.backlogged()) == backlogged:
        taken = waiting.take(first.request_id)
        served[taken.tenant] += taken.cost / WEIGHTS[taken.tenant]
        for one in backlogged:
            for other in backlogged - {one}:
                bound = largest[one] / WEIGHTS[one] + largest[other] / WEIGHTS[other]
                assert abs(served[one] - served[other]) <= bound + 1e-9


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 3), st.booleans()), max_size=60))
def test_it_gives_whenever_it_has_and_everything_once(arrivals: list[tuple[str, int, bool]]) -> None:
    """Work conserving: nobody waits while the queue says that it is nobody's turn."""
    waiting = queue()
    left = set()
    for number, (tenant, priority, leaves) in enumerate(arrivals):
        waiting.push(request(number, tenant, priority=priority), float(number))
        if leaves:
            waiting.remove(f"r{number}")
        else:
            left.add(f"r{number}")
    order = drain(waiting)
    assert sorted(order) == sorted(left)
    assert (len(waiting), waiting.prompt_tokens, waiting.backlogged()) == (0, 0, [])


@pytest.mark.fault(56)
@given(st.integers(1, 200), st.integers(2, 60))
def test_a_newcomer_waits_for_one_request_of_a_flood_at_most(flood: int, cost: int) -> None:
    waiting = queue()
    for number in range(flood):
        waiting.push(request(number, "noisy", cost), 0.0)
    taken = [waiting.take(waiting.first().request_id) for _ in range(flood // 2)]  # type: ignore[union-attr]
    waiting.push(request(1000, "victim", 5), 1.0)
    order = drain(waiting)
    assert order.index("r1000") <= 1
    assert len(taken) + len(order) == flood + 1


@pytest.mark.fault(58)
@given(st.integers(1, 4), st.floats(0.05, 5.0))
def test_low_priority_is_overtaken_for_a_bounded_time_only(steps: int, gap: float) -> None:
    """A flood of higher priority, one request each `gap` seconds for ever: the low one is overtaken by those
    that come less than steps x AGING after it."""
    waiting = queue()
    waiting.push(request(0, priority=steps), 0.0)
    now, overtaken = 0.0, 0
    while True:
        now += gap
        overtaken += 1
        waiting.push(request(overtaken), now)
        first = waiting.first()
        assert first is not None
        waiting.take(first.request_id)
        if first.request_id == "r0":
            break
        assert now <= steps * AGING + gap
    assert (overtaken - 1) * gap <= steps * AGING + 1e-6


def test_priority_orders_what_came_at_the_same_time() -> None:
    waiting = queue()
    for number, priority in enumerate((0, 2, -1, 0)):
        waiting.push(request(number, priority=priority), 5.0)
    assert drain(waiting) == ["r2", "r0", "r3", "r1"]


def test_a_tenant_that_is_not_eligible_is_passed_over_and_gets_nothing_back() -> None:
    waiting = queue()
    for number in range(6):
        waiting.push(request(number, "ab"[number % 2], cost=2), 0.0)
    only_b = lambda tenant: tenant == "b"  # noqa: E731
    assert [waiting.take(waiting.first(only_b).request_id).tenant for _ in range(2)] == ["b", "b"]  # type: ignore[union-attr]
    assert waiting.first(lambda tenant: False) is None
    waiting.push(request(6, "b"), 0.0)
    assert drain(waiting)[:3] in (["r0", "r2", "r5"], ["r0", "r5", "r2"])


def test_memory_is_that_of_what_waits() -> None:
    waiting = queue()
    waiting.push(request(0), 0.0)
    for number in range(1, 5000):
        waiting.push(request(number, priority=1), 0.0)
        waiting.remove(f"r{number}")
    assert len(waiting._tenants["a"].heap) < 20
    for number in range(5000, 5000 + 3 * MAX_IDLE_TENANTS):
        waiting.push(request(number, f"tenant {number}", cost=50), 0.0)
        waiting.take(f"r{number}")
    assert waiting.num_tenants <= MAX_IDLE_TENANTS + 1


@pytest.mark.fault(56)
def test_it_is_remembered_whose_turn_it_was_when_the_queue_ran_empty() -> None:
    """One of the flood always waits, and its name comes first: it must not go first each time."""
    waiting = queue()
    for number in range(0, 20, 2):
        waiting.push(request(number, "flood", 50), 0.0)
        waiting.push(request(number + 1, "victim", 5), 0.0)
        order = drain(waiting)
        assert number == 0 or order == [f"r{number + 1}", f"r{number}"]


def test_of_equals_the_one_that_came_first_goes_first() -> None:
    waiting = queue()
    for number, tenant in ((2, "c"), (1, "a"), (0, "b")):
        waiting.push(request(number, tenant), 0.0)
    assert drain(waiting) == ["r2", "r1", "r0"]


def test_a_request_waits_once() -> None:
    waiting = queue()
    waiting.push(request(0), 0.0)
    with pytest.raises(ValueError, match="r0"):
        waiting.push(request(0), 1.0)


def test_oldest_first() -> None:
    waiting = queue()
    for number in range(4):
        waiting.push(request(number, priority=-number), float(number))
    assert [entry.request_id for entry in waiting.older_than(2.0)] == ["r0", "r1"]


def test_a_tenant_that_is_ahead_is_not_forgiven_for_having_an_empty_queue() -> None:
    waiting = queue()
    waiting.push(request(0, "a", cost=50), 0.0)
    for number in range(10, 25):
        waiting.push(request(number, "b", cost=10), 0.0)
    waiting.take("r0")
    waiting.take("r10")
    waiting.push(request(9, "a", cost=2), 0.0)
    order = drain(waiting)
    assert 6 <= order.index("r9") < len(order) - 1  # b has twice its weight, and gets 100 before a's next one
