"""What becomes of a request whose worker or hand-off failed: continue its log somewhere else.

The log (prompt and tokens so far) is all that a worker needs, so any failure that is not the request's
own becomes "continue this log there". The client sees a pause and no other difference.
"""

from __future__ import annotations

from diptych.core.fleet import WorkerId
from diptych.core.request import Preference

MAX_ATTEMPTS = 4  # per request; somebody who fails four workers is perhaps to blame himself

SUSPECT_SECONDS = 30.0

Pair = tuple[WorkerId, WorkerId]

LOST_WORKER = "worker_lost"
FAILED_HANDOFFS = frozenset(
    {
        "handoff_abandoned",
        "handoff_cancelled",
        "handoff_timeout",
        "kv_corrupt",
        "ticket_refused",
        "transfer_failed",
    }
)


class SuspectPairs:
    """(prefill, decode) pairs whose hand-offs have failed: not to be used again for a while.

    A pair, and not a worker: a bad link says nothing about its two ends with others.
    """

    def __init__(self, seconds: float = SUSPECT_SECONDS) -> None:
        self._seconds = seconds
        self._until: dict[Pair, float] = {}

    def suspect(self, pair: Pair, now: float) -> None:
        """A hand-off between these two has just failed."""
        self._until[pair] = now + self._seconds

    def forget(self, worker_id: WorkerId) -> None:
        """The worker is gone; its next life has links of its own."""
        self._until = {pair: until for pair, until in self._until.items() if worker_id not in pair}

    def at(self, now: float) -> frozenset[Pair]:
        """The pairs to avoid now."""
        self._until = {pair: until for pair, until in self._until.items() if until > now}
        return frozenset(self._until)


def preference_after(code: str, attempt: int, wish: Preference) -> Preference | None:
    """How to route the attempt that follows number `attempt` (from 1), which failed with `code`.

    None: do not try again. After a lost worker the fleet is chosen from as before; after a failed hand-off
    the log is prefilled where it decodes, so that the same link cannot fail it twice.
    """
    if attempt >= MAX_ATTEMPTS:
        return None
    if code == LOST_WORKER:
        return wish
    return Preference.LOCAL if code in FAILED_HANDOFFS else None
