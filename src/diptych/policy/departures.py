"""Workers that leave in good order: their streams go on elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from diptych.core.actions import RouterAction
from diptych.core.fleet import WorkerId, WorkerState, WorkerView
from diptych.policy.attempts import Attempts
from diptych.policy.deadlines import Deadlines
from diptych.policy.placement import Place


class Departures:
    """Who leaves, and since when.

    Attributes:
        moved: streams that were handed over.
    """

    def __init__(self, attempts: Attempts, deadlines: Deadlines) -> None:
        self.moved = 0
        self._attempts = attempts
        self._deadlines = deadlines
        self._since: dict[WorkerId, float] = {}

    def updated(self, view: WorkerView, now: float) -> list[RouterAction]:
        """A worker has said how it is: it may have begun to leave."""
        if view.state is not WorkerState.DRAINING:
            self._since.pop(view.worker_id, None)
        elif view.worker_id not in self._since:
            self._since[view.worker_id] = now
            return self._move_off(view, now)
        return []

    def gone(self, worker_id: WorkerId) -> bool:
        """It is not there any more. Returns whether it was about to leave."""
        return self._since.pop(worker_id, None) is not None

    def tick(self, workers: Mapping[WorkerId, WorkerView], now: float) -> list[RouterAction]:
        """Go on with all of them."""
        return [action for worker_id in self._since for action in self._move_off(workers[worker_id], now)]

    def _move_off(self, source: WorkerView, now: float) -> list[RouterAction]:
        """Streams of a worker that leaves go on elsewhere: with their KV as soon as all of it is there, without it
        when they have had their time."""
        overtime = now - self._since[source.worker_id] > self._deadlines.drain
        actions: list[RouterAction] = []
        for live in list(self._attempts.running.values()):
            if live.shadow is not None or not live.needs(source.worker_id):
                continue
            place: Place | None = None
            if live.decodes:
                live.kv_at[source.worker_id] = live.num_tokens - 1
                place = self._attempts.onward(live, source)
            if place is None and overtime:
                place = self._attempts.place(live)
            if place is not None:
                self.moved += 1
                actions += self._attempts.move(live, place, now)
        return actions
