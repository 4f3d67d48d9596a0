"""Waits between tries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.policy.backoff import FIRST_SECONDS, LONGEST_SECONDS, Backoff


@pytest.mark.fault(47)
def test_waits_double_up_to_a_limit_and_start_over_after_a_success() -> None:
    backoff = Backoff(patience=1e9, now=0.0)
    assert [backoff.failed(0.0) for _ in range(8)] == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    backoff.succeeded(100.0)
    assert backoff.failed(100.0) == FIRST_SECONDS


@given(patience=st.floats(0, 1000), start=st.floats(0, 1e6), each=st.floats(0, 5))
def test_it_gives_up_exactly_at_the_end_of_its_patience(patience: float, start: float, each: float) -> None:
    """`each` is what a try itself takes."""
    backoff = Backoff(patience, start)
    now = start
    while (wait := backoff.failed(now)) is not None:
        assert 0 < wait <= LONGEST_SECONDS
        assert now < start + patience
        now += wait + each
    assert now >= start + patience
