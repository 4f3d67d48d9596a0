"""How many attempts may be repeated, and how long to wait before: so that failures do not multiply.

The budget is a token bucket: each request brings a share of a repeated attempt, and a trickle besides lets a fleet
without traffic recover. (The idea: "Handling Overload", ch. 21 of Google's SRE book: retries are at most a tenth of
all requests.)
"""

from __future__ import annotations

import hashlib

FIRST_WAIT = 0.5  # seconds, half of it at least, before the second repetition; the first one goes at once
LONGEST_WAIT = 5.0


class RetryBudget:
    """At most `share` repetitions per request and `rate` per second on top; `burst` can be saved up."""

    def __init__(self, *, share: float = 0.1, rate: float = 5.0, burst: float = 50.0) -> None:
        self._share = share
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._as_of: float | None = None

    def request(self, now: float) -> None:
        """A request was accepted: it brings its share."""
        self._refill(now, self._share)

    def has(self, now: float) -> bool:
        """Whether there is one repetition left."""
        self._refill(now)
        return self._tokens >= 1.0

    def take(self, now: float) -> bool:
        """Spend one repetition; False if there is none left."""
        if not self.has(now):
            return False
        self._tokens -= 1.0
        return True

    def _refill(self, now: float, more: float = 0.0) -> None:
        elapsed = 0.0 if self._as_of is None else max(0.0, now - self._as_of)
        self._as_of = now
        self._tokens = min(self._burst, self._tokens + self._rate * elapsed + more)


def wait_before_retry(request_id: str, retry: int) -> float:
    """Seconds before repetition number `retry` (from 1) of a request: none, then doubling, each between half and all
    of its size. The jitter follows from request and number, so that equal histories give equal waits."""
    if retry <= 1:
        return 0.0
    longest = min(FIRST_WAIT * 2.0 ** min(retry - 2, 30), LONGEST_WAIT)
    draw = int.from_bytes(hashlib.blake2b(f"{request_id} {retry}".encode(), digest_size=8).digest(), "big")
    return longest * (0.5 + 0.5 * draw / 2**64)
