"""Whom to trust with a stream: the breakers of all workers and of all pairs, judged by how streams end.

A fault of a pair (a hand-off that failed) trips the pair only: a bad link says nothing about its two ends with others.
A breaker that has been open long enough wants a canary (see `RouterPolicy`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

from diptych.core.fleet import WorkerId
from diptych.policy.breaker import Breakers, BreakerSettings
from diptych.policy.deadlines import Wait
from diptych.policy.live_request import LiveRequest, Pair

_K = TypeVar("_K", bound=Hashable)


class Health:
    """Outcomes in, verdicts out."""

    def __init__(self, worker: BreakerSettings, pair: BreakerSettings) -> None:
        self.workers: Breakers[WorkerId] = Breakers(worker)
        self.pairs: Breakers[Pair] = Breakers(pair)
        self._last_token: dict[WorkerId, float] = {}

    def token_from(self, worker_id: WorkerId, now: float) -> None:
        """Its engine runs."""
        self._last_token[worker_id] = now

    def served(self, live: LiveRequest) -> None:
        """A stream has come to its end."""
        if live.route is None:
            return
        self.workers.succeeded(live.route.decode)
        pair = live.pair
        if pair is not None and live.handed_over:
            self.workers.succeeded(pair[0])
            self.pairs.succeeded(pair)

    def handoff_failed(self, pair: Pair, now: float) -> None:
        self.pairs.failed(pair, now)

    def worker_failed(self, worker_id: WorkerId, now: float) -> None:
        self.workers.failed(worker_id, now)

    def is_stuck(self, live: LiveRequest) -> bool:
        """Whether nothing at all moves where this stream waits, as opposed to others being served before it."""
        if _awaits_handoff(live):
            return True
        return live.awaited is not None and self._last_token.get(live.awaited, live.wait_since) <= live.wait_since

    def late(self, live: LiveRequest, now: float) -> None:
        """A stream has waited for too long. If that is anybody's fault, it is the pair's whose hand-off does not come
        to its end, or the worker's that computes nothing for anybody."""
        if live.pair is not None and _awaits_handoff(live):
            self.handoff_failed(live.pair, now)
        elif live.awaited is not None and live.computes_on(live.awaited) and self.is_stuck(live):
            self.worker_failed(live.awaited, now)

    def gone(self, worker_id: WorkerId, now: float, *, died: bool) -> None:
        """Its next life has links of its own, but it is the same machine: deaths are remembered."""
        self._last_token.pop(worker_id, None)
        for pair in self.pairs.known:
            if worker_id in pair:
                self.pairs.forget(pair)
        if died:
            self.workers.failed(worker_id, now, fatal=True)
        else:
            self.workers.probe_lost(worker_id)

    # canaries

    @property
    def all_well(self) -> bool:
        """Nobody has failed lately."""
        return not len(self.workers) and not len(self.pairs)

    def due(self, ready: Iterable[WorkerId], now: float) -> list[WorkerId | Pair]:
        """Whom to probe now, of workers that are ready and trusted pairs of them."""
        there = set(ready)
        due: list[WorkerId | Pair] = [worker for worker in self.workers.due(now) if worker in there]
        trusted = there - self.workers.blocked()
        due += [pair for pair in self.pairs.due(now) if trusted.issuperset(pair)]
        return due

    def probe(self, target: WorkerId | Pair) -> None:
        if isinstance(target, tuple):
            self.pairs.probe(target)
        else:
            self.workers.probe(target)

    def probed(self, target: WorkerId | Pair, ok: bool, now: float) -> None:
        """How a probe has ended."""
        if isinstance(target, tuple):
            _conclude(self.pairs, target, ok, now)
        else:
            _conclude(self.workers, target, ok, now)

    def next_due(self, now: float) -> float | None:
        """When somebody will want a canary, if nobody does now."""
        due = [self.workers.next_due(now), self.pairs.next_due(now)]
        return min((when for when in due if when is not None), default=None)

    def prune(self, now: float) -> None:
        """Forget what was long ago."""
        self.workers.prune(now)
        self.pairs.prune(now)


def _awaits_handoff(live: LiveRequest) -> bool:
    """The first token has come, and the decode worker has not gone on from it."""
    return live.pair is not None and live.wait is Wait.STALL and not live.handed_over


def _conclude(breakers: Breakers[_K], key: _K, ok: bool, now: float) -> None:
    if ok:
        breakers.probe_succeeded(key)
    else:
        breakers.failed(key, now)
