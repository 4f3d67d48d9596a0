"""Attempts that are no client's: canaries of workers and pairs, and copies of streams' KV."""

from __future__ import annotations

from diptych.core.actions import RouterAction
from diptych.core.fleet import Route, WorkerId, WorkerView
from diptych.policy.attempts import Attempts
from diptych.policy.canary import canary
from diptych.policy.checkpoints import TICKET_SECONDS, Checkpoints
from diptych.policy.deadlines import Wait
from diptych.policy.health import Health
from diptych.policy.kv_paths import KVPaths
from diptych.policy.live_request import Checkpoint, LiveRequest, Pair, Probe, Rival
from diptych.policy.placement import Place, Placement
from diptych.policy.recovery import Fault, RecoverySettings, fault


class Shadows:
    """Starts them, and tells who wants to know how they end.

    Attributes:
        checkpoints: the books of copies.
        paths: which pairs have handed KV over.
    """

    def __init__(self, attempts: Attempts, placement: Placement, health: Health, settings: RecoverySettings) -> None:
        self._attempts = attempts
        self._placement = placement
        self._health = health
        self._deadlines = settings.deadlines
        self.paths = KVPaths(settings.try_paths)
        self.checkpoints = Checkpoints(attempts, placement)
        self._num_canaries = 0

    def probe(self, now: float) -> list[RouterAction]:
        """Send a canary to whoever has been out of use for long enough, and over pairs that are new."""
        if self._health.all_well and not self.paths.untried:
            return []
        ready = {worker.worker_id: worker for worker in self._placement.ready()}
        due = self._health.due(ready, now)
        due += self.paths.due(self._attempts.trusted(), self._placement.transport, self._health.pairs.blocked())
        actions: list[RouterAction] = []
        for target in due:
            route = self._route_to(target, ready)
            if route is not None:
                self._num_canaries += 1
                self._health.probe(target)
                live = canary(self._num_canaries, target, now)
                actions.append(self._attempts.begin(live, Place(route, 0), now))
        return actions

    def _route_to(self, target: WorkerId | Pair, ready: dict[WorkerId, WorkerView]) -> Route | None:
        if not isinstance(target, tuple):
            return Route(target)
        prefill, decode = target
        transport = self._placement.transport(ready[prefill], ready[decode])
        return None if transport is None else Route(decode, prefill, transport)

    def copy(self, stream: LiveRequest, now: float) -> list[RouterAction]:
        """Begin with the next copy of a stream's KV, if it wants one now."""
        return self.checkpoints.keep(stream, now)

    def succeeded(self, live: LiveRequest, now: float) -> None:
        """A shadow has come to its end, or a stream."""
        match live.shadow:
            case None:
                self._health.served(live)
                if live.pair is not None and live.handed_over:
                    self.paths.succeeded(live.pair)
            case Probe(target):
                self._health.probed(target, True, now)
                if isinstance(target, tuple):
                    self.paths.succeeded(target)
            case Checkpoint(stream):
                self.checkpoints.ended(live, stream, ok=True)

    def failed(
        self, live: LiveRequest, now: float, failed_on: WorkerId | None = None, code: str = ""
    ) -> list[RouterAction]:
        """It has not. A copy that a worker could not compute says nothing that the worker's streams do not say, too."""
        match live.shadow:
            case Probe(target):
                self._health.probed(target, False, now)
                if isinstance(target, tuple):
                    self.paths.failed(target)
            case Checkpoint(stream):
                self.checkpoints.ended(live, stream, ok=False)
            case Rival(stream):
                stream.rivals.remove(live)
                if failed_on is not None and fault(code, split=live.pair is not None) is Fault.WORKER:
                    self._health.worker_failed(failed_on, now)
        if live.pair is not None and fault(code, split=True) is Fault.PAIR and not isinstance(live.shadow, Probe):
            self._health.handoff_failed(live.pair, now)
        return self._attempts.let_go(live, now, failed_on)

    def lost(self, live: LiveRequest, now: float, worker_id: WorkerId) -> list[RouterAction]:
        """A worker that it needs is gone."""
        match live.shadow:
            case Checkpoint(stream):
                self.checkpoints.ended(live, stream, ok=False)
            case Rival(stream):
                stream.rivals.remove(live)
        return self._attempts.let_go(live, now, worker_id)

    def check_deadlines(self, now: float) -> list[RouterAction]:
        """Give up what takes too long."""
        return [
            action for live in self._attempts.shadows() if self._is_late(live, now) for action in self.failed(live, now)
        ]

    def _is_late(self, live: LiveRequest, now: float) -> bool:
        age = now - live.timeline.arrived
        if isinstance(live.shadow, Rival):
            return False  # it ends with its race
        if isinstance(live.shadow, Probe):
            return age > self._deadlines.canary
        return age > (TICKET_SECONDS if live.wait is Wait.RESERVE else self._deadlines.checkpoint)
