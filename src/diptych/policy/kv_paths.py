"""Which pairs of workers have really handed KV over, and which are to show that they can.

A worker that registers may be cut off from the others: a firewall, a wrong address, memory that cannot be mapped. So
that no client's request has to find that out, each prefill and each decode worker hands a canary's KV over with one
partner as soon as there is one. The other pairs are tried by requests; a pair that fails is one for its breaker.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from diptych.core.fleet import Readiness, Role, WorkerId, WorkerView, can_serve
from diptych.policy.live_request import Pair

Transport = Callable[[WorkerView, WorkerView], str | None]


class KVPaths:
    """What is known of the pairs of present lives. With `enabled` false nothing is tried, and all is believed.

    Attributes:
        untried: workers in no pair that has handed over or is about to.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self.untried: set[WorkerId] = set()
        self._trying: set[Pair] = set()
        self._proven: set[Pair] = set()

    def joined(self, worker_id: WorkerId) -> None:
        """A new life."""
        if self._enabled:
            self.untried.add(worker_id)

    def gone(self, worker_id: WorkerId) -> None:
        """A life is over; its partners may have to show with others what they can."""
        over = {pair for pair in self._trying | self._proven if worker_id in pair}
        self._trying -= over
        self._proven -= over
        for pair in over:
            self._look_for_others(pair)
        self.untried.discard(worker_id)

    def due(self, trusted: Sequence[WorkerView], transport: Transport, blocked: Collection[Pair]) -> list[Pair]:
        """Pairs that are to hand a canary's KV over now. They count as being tried from now on."""
        pairs = [
            (source.worker_id, target.worker_id)
            for source in trusted
            if source.role is Role.PREFILL
            for target in trusted
            if target.role is not Role.PREFILL
            and not self.untried.isdisjoint((source.worker_id, target.worker_id))
            and transport(source, target) is not None
        ]
        due: list[Pair] = []
        for needed in (2, 1):  # first those of whom neither has been tried
            for pair in pairs:
                if pair not in blocked and len(self.untried.intersection(pair)) >= needed:
                    due.append(pair)
                    self.untried.difference_update(pair)
        self._trying.update(due)
        return due

    def succeeded(self, pair: Pair) -> None:
        """KV has come from the one to the other."""
        if self._enabled:
            self._trying.discard(pair)
            self._proven.add(pair)
            self.untried.difference_update(pair)

    def failed(self, pair: Pair) -> None:
        """A canary has not. (Its breaker is open now.)"""
        if pair in self._trying:
            self._trying.discard(pair)
            self._look_for_others(pair)

    def readiness(self, trusted: Sequence[WorkerView], blocked: Collection[Pair]) -> Readiness:
        """Of these workers: degraded if no pair can hand KV over, so that requests are served un-split."""
        roles = {worker.role for worker in trusted}
        if not can_serve(roles):
            return Readiness.NO
        there = {worker.worker_id for worker in trusted}
        proven = any(there.issuperset(pair) for pair in self._proven.difference(blocked))
        if proven or not self._enabled or not {Role.PREFILL, Role.DECODE} <= roles:
            return Readiness.YES
        if self._trying and Role.MIXED not in roles:
            return Readiness.NO  # it will be known in a moment
        return Readiness.DEGRADED

    def _look_for_others(self, pair: Pair) -> None:
        known = {worker_id for pair in self._trying | self._proven for worker_id in pair}
        self.untried.update(set(pair) - known)
