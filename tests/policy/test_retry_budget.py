from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.policy.retry_budget import FIRST_WAIT, LONGEST_WAIT, RetryBudget, wait_before_retry


def spend_all(budget: RetryBudget, now: float) -> int:
    spent = 0
    while budget.take(now):
        spent += 1
    return spent


@pytest.mark.fault(60)
def test_a_tenth_of_the_traffic_and_a_trickle() -> None:
    budget = RetryBudget(share=0.125, rate=5.0, burst=50.0)
    assert spend_all(budget, 0.0) == 50
    for _ in range(80):
        budget.request(0.0)
    assert spend_all(budget, 0.0) == 10
    assert spend_all(budget, 2.0) == 10
    assert spend_all(budget, 1000.0) == 50


def test_time_that_stands_still_or_goes_back_brings_nothing() -> None:
    budget = RetryBudget(rate=5.0, burst=1.0)
    assert spend_all(budget, 10.0) == 1
    assert spend_all(budget, 10.0) == 0
    assert spend_all(budget, 5.0) == 0


@given(st.text(max_size=20), st.integers(2, 100))
def test_waits_double_and_are_jittered_the_same_way_each_time(request_id: str, retry: int) -> None:
    wait = wait_before_retry(request_id, retry)
    longest = min(FIRST_WAIT * 2 ** (retry - 2), LONGEST_WAIT)
    assert longest / 2 <= wait <= longest
    assert wait == wait_before_retry(request_id, retry)


def test_the_first_repetition_goes_at_once_and_requests_do_not_go_in_step() -> None:
    assert wait_before_retry("r", 1) == 0.0
    assert len({wait_before_retry(f"r{number}", 3) for number in range(100)}) == 100


@pytest.mark.parametrize(("retry", "longest"), [(2, 0.5), (3, 1.0), (4, 2.0), (5, 4.0), (6, 5.0), (60, 5.0)])
def test_waits_are_spread_over_the_upper_half_of_their_size(retry: int, longest: float) -> None:
    waits = [wait_before_retry(f"r{number}", retry) for number in range(500)]
    assert longest / 2 <= min(waits) < 0.52 * longest
    assert 0.98 * longest < max(waits) <= longest
