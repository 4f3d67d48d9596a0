"""Time is an argument. Shells own a Clock; policy is only ever told what time it is."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock in seconds. Its zero means nothing; only differences do."""

    def now(self) -> float: ...


class WallClock:
    """The machine's monotonic clock: unaffected by jumps of the calendar."""

    def now(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A clock that stands still until somebody moves it (simulation, tests)."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance_to(self, when: float) -> None:
        """Move forward to `when`. Raises ValueError on an attempt to go back."""
        if when < self._now:
            raise ValueError(f"time runs forward: {when} < {self._now}")
        self._now = when
