"""Circuit breakers (Nygard, "Release It!", 2007): whom not to use for a while, and how trust comes back.

    closed ── failures in a row, or a death ──► open ── its time is over ──► half-open ── probe ok ──► closed
                                                 ▲                              │
                                                 └────────── probe failed ──────┘

Each opening lasts twice as long as the one before it, until all has been well for a while. So somebody who
dies every few seconds gets ever less to do, however well he does in between. While a breaker is half-open it
lets nothing through but a probe (`RouterPolicy` sends a canary), never a client's request.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from diptych.core.fleet import BreakerState

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerSettings:
    """`failures` in a row open a breaker, for `first` seconds and then for twice as long each time, up to
    `longest`; after `calm` seconds without a failure it starts over. `longest` is less than a stream waits in the
    queue (`Deadlines.queue`), so that a fleet of one worker gets another chance with the same streams."""

    failures: int = 3
    first: float = 0.5
    longest: float = 30.0
    calm: float = 60.0


@dataclass(slots=True)
class _Breaker:
    failures: int = 0  # since the last success
    openings: int = 0  # since it was calm
    closed: bool = True
    until: float = 0.0  # open until then, half-open after it
    probing: bool = False
    last_failure: float = 0.0

    def state(self, now: float) -> BreakerState:
        if self.closed:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self.until else BreakerState.HALF_OPEN


class Breakers(Generic[K]):
    """One breaker for each key that has failed lately; whoever is not here is trusted."""

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._breakers: dict[K, _Breaker] = {}

    def __len__(self) -> int:
        return len(self._breakers)

    def state(self, key: K, now: float) -> BreakerState:
        breaker = self._breakers.get(key)
        return BreakerState.CLOSED if breaker is None else breaker.state(now)

    def states(self, now: float) -> dict[K, BreakerState]:
        """Of all that have failed lately."""
        return {key: breaker.state(now) for key, breaker in self._breakers.items()}

    def failed(self, key: K, now: float, *, fatal: bool = False) -> None:
        """One stream has failed by its fault. A `fatal` one opens the breaker at once, as does a failed probe."""
        breaker = self._breakers.setdefault(key, _Breaker())
        if now - breaker.last_failure > self._settings.calm:
            breaker.openings = 0
        breaker.last_failure = now
        breaker.failures += 1
        probe_failed, breaker.probing = breaker.probing, False
        if breaker.closed and not fatal and breaker.failures < self._settings.failures:
            return
        if breaker.state(now) is BreakerState.OPEN and not fatal and not probe_failed:
            return  # a straggler of what it is open for already
        breaker.closed = False
        breaker.until = now + min(self._settings.first * 2.0**breaker.openings, self._settings.longest)
        breaker.openings += 1

    def succeeded(self, key: K) -> None:
        """A stream has ended well. It says nothing about a breaker that opened while it ran: only a probe closes."""
        breaker = self._breakers.get(key)
        if breaker is not None and breaker.closed:
            breaker.failures = 0

    def probe(self, key: K) -> None:
        """A probe is under way: of somebody who failed, or of somebody new, whose breaker stays closed until then."""
        self._breakers.setdefault(key, _Breaker()).probing = True

    def probe_succeeded(self, key: K) -> None:
        """Trust is back."""
        breaker = self._breakers.get(key)
        if breaker is not None and breaker.probing:
            breaker.closed, breaker.probing, breaker.failures = True, False, 0
            if not breaker.openings:
                self.forget(key)  # it has never failed

    def probe_lost(self, key: K) -> None:
        """Nobody will know how the probe would have gone."""
        breaker = self._breakers.get(key)
        if breaker is not None:
            breaker.probing = False

    def blocked(self) -> frozenset[K]:
        """Those that get no client's request now: open or half-open."""
        return frozenset(key for key, breaker in self._breakers.items() if not breaker.closed)

    def due(self, now: float) -> list[K]:
        """Half-open ones without a probe under way."""
        return [
            key
            for key, breaker in self._breakers.items()
            if breaker.state(now) is BreakerState.HALF_OPEN and not breaker.probing
        ]

    def next_due(self, now: float) -> float | None:
        """When the next open one becomes half-open."""
        return min((b.until for b in self._breakers.values() if b.state(now) is BreakerState.OPEN), default=None)

    def forget(self, key: K) -> None:
        self._breakers.pop(key, None)

    @property
    def known(self) -> tuple[K, ...]:
        """Those that have failed lately."""
        return tuple(self._breakers)

    def prune(self, now: float) -> None:
        """Drop what has been calm: the memory of failures is bounded by time, and so by their rate."""
        calm = self._settings.calm
        self._breakers = {k: b for k, b in self._breakers.items() if now - b.last_failure <= calm or b.probing}
