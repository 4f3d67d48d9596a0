"""Who runs where: attempts that have begun, and requests that wait for somebody to begin with."""

from __future__ import annotations

from collections.abc import Collection

from diptych.core.actions import AbortOn, RouterAction
from diptych.core.fleet import WorkerId, WorkerView
from diptych.policy.health import Health
from diptych.policy.live_request import LiveRequest
from diptych.policy.placement import Avoid, Place, Placement, loads_of
from diptych.policy.recovery import POISON_CRASHES
from diptych.policy.retry_budget import RetryBudget, wait_before_retry
from diptych.policy.routing import WorkerLoad
from diptych.policy.saturation import Pending


class Attempts:
    """Starts and ends attempts, within the limits of trust and budget.

    Attributes:
        running: by attempt id.
        waiting: by request id, oldest first: those that run nowhere. There are never more than admission lets in.
        retried: attempts after the first.
    """

    def __init__(self, placement: Placement, health: Health, budget: RetryBudget) -> None:
        self.running: dict[str, LiveRequest] = {}
        self.waiting: dict[str, LiveRequest] = {}
        self.retried = 0
        self._placement = placement
        self._health = health
        self._budget = budget

    def loads(self) -> dict[WorkerId, WorkerLoad]:
        """What each worker has been given and not finished."""
        return loads_of(live for live in self.running.values() if live.is_load)

    def pending(self) -> list[Pending]:
        """Attempts that have been given to workers and have no first token yet."""
        return [
            Pending(live.route.prefill or live.route.decode, live.route.decode, live.prefill)
            for live in self.running.values()
            if live.route is not None and live.prefill_tokens
        ]

    def shadows(self) -> list[LiveRequest]:
        """Those under way."""
        return [live for live in self.running.values() if live.shadow is not None]

    # beginning

    def seat(self, live: LiveRequest, now: float, avoid: Collection[WorkerId] = ()) -> list[RouterAction]:
        """Start the next attempt if it may begin now and somebody can take it (rather not those to `avoid`); else the
        request waits here."""
        place = None
        if not self._must_wait(live, now):
            place = self.place(live, avoid) or self.place(live)
        if place is None or not self.spend(live, now):
            self.waiting[live.request.request_id] = live
            return []
        self.waiting.pop(live.request.request_id, None)
        return [self.begin(live, place, now)]

    def place(self, live: LiveRequest, avoid: Collection[WorkerId] = ()) -> Place | None:
        """Where the log is continued best; None if there is nobody but those to avoid."""
        return self._placement.place(live, self.loads(), self._whom_to_avoid(avoid))

    def onward(self, live: LiveRequest, source: WorkerView, avoid: Collection[WorkerId] = ()) -> Place | None:
        """Where `source`, which has all of its KV, can hand a stream over to."""
        return self._placement.onward(live, source, self.loads(), self._whom_to_avoid(avoid))

    def _whom_to_avoid(self, more: Collection[WorkerId] = ()) -> Avoid:
        return Avoid(self._health.workers.blocked().union(more), self._health.pairs.blocked())

    def spend(self, live: LiveRequest, now: float) -> bool:
        """Take its next attempt out of the budget; False if there is none for it."""
        return not _costs(live) or self._budget.take(now)

    def begin(self, live: LiveRequest, place: Place, now: float) -> RouterAction:
        """Have the place's workers begin with the log as it is."""
        action = live.begin(place.route, place.prefill_tokens, now)
        self.running[live.attempt_id] = live
        self.retried += live.attempt > 1
        return action

    def give(self, rival: LiveRequest, stream: LiveRequest) -> None:
        """A rival's attempt is the stream's from now on."""
        stream.take_over(rival)
        self.running[stream.attempt_id] = stream

    def are_there(self, workers: Collection[WorkerId]) -> bool:
        """Whether the router still has all of them."""
        return all(worker in self._placement.workers for worker in workers)

    def resume(self, now: float) -> list[RouterAction]:
        """Whoever waits and need not any more, oldest first."""
        if not self.waiting or not self.trusted():
            return []
        return [action for live in list(self.waiting.values()) for action in self.seat(live, now)]

    def trusted(self) -> list[WorkerView]:
        """Workers that are ready, and get clients' requests."""
        blocked = self._health.workers.blocked()
        return [worker for worker in self._placement.ready() if worker.worker_id not in blocked]

    def _must_wait(self, live: LiveRequest, now: float) -> bool:
        """Its back-off is not over, the budget is spent, or it is on trial and has to be tried alone."""
        if live.not_before > now or (_costs(live) and not self._budget.has(now)):
            return True
        return _on_trial(live) and any(_on_trial(other) for other in self.running.values())

    # ending

    def let_go(self, live: LiveRequest, now: float, finished_on: WorkerId | None = None) -> list[RouterAction]:
        """End the attempt, if there is one, with its rivals and the copy of its KV that is under way: have their
        workers stop, except where it has ended by itself."""
        done = {finished_on, live.route.prefill if live.route is not None and live.handed_over else None}
        aborts: list[RouterAction] = [AbortOn(w, live.attempt_id) for w in live.workers if w not in done]
        self.running.pop(live.attempt_id, None)
        self.waiting.pop(live.request.request_id, None)
        live.stop(now)
        others = live.rivals if live.backup.copy is None else [*live.rivals, live.backup.copy]
        live.rivals, live.backup.copy = [], None
        return aborts + [action for other in others for action in self.let_go(other, now)]

    def retry(self, live: LiveRequest, now: float, avoid: Collection[WorkerId] = ()) -> list[RouterAction]:
        """Continue a log whose attempt has ended, now or when somebody can."""
        live.retries += 1
        live.not_before = now + wait_before_retry(live.request.request_id, live.retries)
        return self.seat(live, now, avoid)

    def move(self, live: LiveRequest, place: Place, now: float) -> list[RouterAction]:
        """Continue a log that still runs somewhere at another place."""
        return [*self.let_go(live, now), self.begin(live, place, now)]

    # time

    def wake_at(self, now: float) -> float | None:
        """When there will be something to start that has to wait now."""
        times = [live.not_before for live in self.waiting.values() if live.not_before > now]
        probe = self._health.next_due(now)
        return min(times if probe is None else [*times, probe], default=None)


def _costs(live: LiveRequest) -> bool:
    """The first attempt, and the first repetition of one that had got on, are free: there are never more of them than
    requests. What is repeated again and again is paid for."""
    return live.retries > 1


def _on_trial(live: LiveRequest) -> bool:
    return live.crashes == POISON_CRASHES - 1
