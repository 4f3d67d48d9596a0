from __future__ import annotations

import pytest

from diptych.core.clock import Clock, VirtualClock, WallClock


@pytest.mark.fault(53)
@pytest.mark.parametrize("clock", [WallClock(), VirtualClock(3.0)])
def test_time_does_not_run_backwards(clock: Clock) -> None:
    before = clock.now()
    assert clock.now() >= before


def test_virtual_time_moves_only_when_told() -> None:
    clock = VirtualClock(3.0)
    clock.advance_to(3.0)
    clock.advance_to(4.5)
    assert clock.now() == 4.5
    with pytest.raises(ValueError, match="time runs forward"):
        clock.advance_to(4.0)
    assert clock.now() == 4.5
