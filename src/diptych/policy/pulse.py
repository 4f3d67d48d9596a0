"""Telling the silence of others from a standstill of one's own."""

from __future__ import annotations


class Pulse:
    """Of a loop that should beat every `interval` seconds. Whoever was frozen, or had no processor, has not read what
    others said meanwhile, so at that moment their silence says nothing.

    Attributes:
        last: when it last beat.
    """

    def __init__(self, interval: float, now: float) -> None:
        self._interval = interval
        self.last = now

    def beat(self, now: float) -> bool:
        """Once more. False if the loop has stood still since the last time."""
        steady = now - self.last <= 2 * self._interval
        self.last = now
        return steady
