"""Workers that leave: their streams go on elsewhere before they end."""

from __future__ import annotations

from collections.abc import Mapping

from diptych.core.actions import RouterAction
from diptych.core.fleet import WorkerId, WorkerState, WorkerView
from diptych.policy.attempts import Attempts
from diptych.policy.placement import Place


class Departures:
    """Who leaves, and since when. A worker may keep a stream that cannot be handed over with its KV for `patience`
    seconds.

    Attributes:
        moved: streams that were handed over.
    """

    def __init__(self, attempts: Attempts, patience: float) -> None:
        self._attempts = attempts
        self._patience = patience
        self._since: dict[WorkerId, float] = {}
        self.moved = 0

    def updated(self, view: WorkerView, now: float) -> list[RouterAction]:
        """A worker has said how it is."""
        if view.state is not WorkerState.DRAINING:
            self._since.pop(view.worker_id, None)
        elif view.worker_id not in self._since:
            self._since[view.worker_id] = now
            return self._move_off(view, now)
        return []

    def gone(self, worker_id: WorkerId) -> bool:
        """A worker is no more. Returns whether it had said that it would leave."""
        return self._since.pop(worker_id, None) is not None

    def go_on(self, workers: Mapping[WorkerId, WorkerView], now: float) -> list[RouterAction]:
        """Move what could not be moved before."""
        return [action for worker_id in list(self._since) for action in self._move_off(workers[worker_id], now)]

    def _move_off(self, source: WorkerView, now: float) -> list[RouterAction]:
        """Its streams go on elsewhere: with their KV as soon as all of it is there, without it when they have had their
        time."""
        overtime = now - self._since[source.worker_id] > self._patience
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
