"""Deadlines of sessions: one thread, asleep until the next of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Leases(Generic[T]):
    """Calls `expired(holder)`, on its own thread, when a holder's time is up. Holders are hashable."""

    def __init__(self, expired: Callable[[T], None]) -> None:
        self._expired = expired
        self._deadlines: dict[T, float] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="leases", daemon=True)
        self._thread.start()

    def grant(self, holder: T, seconds: float) -> None:
        """`holder` has this long from now."""
        with self._changed:
            self._deadlines[holder] = time.monotonic() + seconds
            self._changed.notify()

    def end(self, holder: T) -> None:
        """`holder` needs no more time. Harmless if it has none."""
        with self._changed:
            self._deadlines.pop(holder, None)  # the thread may wake up once for nothing

    def close(self) -> None:
        """End the thread; nothing expires any more."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _watch(self) -> None:
        while (overdue := self._next()) is not None:
            for holder in overdue:
                self._expired(holder)

    def _next(self) -> list[T] | None:
        """Wait for deadlines to pass; whose they were. None when closing."""
        with self._changed:
            while not self._closing:
                now = time.monotonic()
                overdue = [holder for holder, deadline in self._deadlines.items() if deadline <= now]
                if overdue:
                    for holder in overdue:
                        del self._deadlines[holder]
                    return overdue
                self._changed.wait(min(self._deadlines.values()) - now if self._deadlines else None)
            return None
