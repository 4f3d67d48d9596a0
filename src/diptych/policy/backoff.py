"""How long to wait before trying again, and when to give up."""

from __future__ import annotations

FIRST_SECONDS = 0.25
LONGEST_SECONDS = 8.0


class Backoff:
    """Waits that double while nothing works; after `patience` seconds without success there are none."""

    def __init__(self, patience: float, now: float) -> None:
        self._patience = patience
        self._wait = FIRST_SECONDS
        self._failing_since = now

    def succeeded(self, now: float) -> None:
        """It works: the next failure is the first again."""
        self._wait = FIRST_SECONDS
        self._failing_since = now

    def failed(self, now: float) -> float | None:
        """Seconds until the next try; None to give up."""
        left = self._failing_since + self._patience - now
        if left <= 0:
            return None
        wait = min(self._wait, left)
        self._wait = min(2 * self._wait, LONGEST_SECONDS)
        return wait
