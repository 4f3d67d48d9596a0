"""A worker that hears nothing from its router."""

from __future__ import annotations

import pytest

from diptych.core.clock import VirtualClock
from diptych.worker.router_watch import RouterWatch


def beats(clock: VirtualClock, watch: RouterWatch, until: int) -> list[int]:
    """When the router counted as lost, looking every second."""
    lost = []
    for second in range(int(clock.now()) + 1, until):
        clock.advance_to(second)
        if watch.is_silent():
            lost.append(second)
    return lost


@pytest.mark.fault(36)
def test_a_router_that_says_nothing_is_given_up() -> None:
    clock = VirtualClock()
    watch = RouterWatch(clock)
    assert beats(clock, watch, 15) == []
    watch.heard()
    assert beats(clock, watch, 37) == [35, 36]


def test_a_worker_that_stood_still_has_not_listened() -> None:
    clock = VirtualClock()
    watch = RouterWatch(clock)
    clock.advance_to(100.0)
    assert not watch.is_silent()
    assert beats(clock, watch, 122) == [121]
