"""What becomes of a request whose worker or hand-off failed: its log is continued somewhere else.

The log (prompt and tokens so far) is all that a worker needs, so any failure that is not the request's own becomes
"continue this log there, with whatever KV exists". Where "there" is follows from predicted seconds alone
(`policy.routing`), and this is the ladder that comes out:

    the prefill worker still has the prompt's KV    that worker again, and another one to decode
    another pair, or one worker alone               prompt and tokens so far are prefilled once more
    no decode worker (or no prefill worker) left    whoever is left does both
    nobody left                                     wait in the router until somebody is back, or a deadline passes

There is no number of attempts after which a request is given up: somebody who can serve it will. What bounds them is
the budget and the waits of `policy.retry_budget`, the breakers of `policy.health`, the deadlines, and `POISON_CRASHES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from diptych.policy.breaker import BreakerSettings
from diptych.policy.deadlines import Deadlines

POISON = "poison_request"

POISON_CRASHES = 3
"""A request during which so many workers in a row died is perhaps what kills them. One crash short of it, it is on
trial: only one such request runs at a time, so that the next crash cannot end those that were merely there, too."""

SETTLE_SECONDS = 0.25
"""Deaths of several workers at once are noticed one after the other, and a stream that is continued at once may be sent
to a worker that is dead already. So a death this soon after that tells nothing about the request; the next attempt
waits for longer (`retry_budget`)."""

OWN_FAULTS = frozenset({"engine_corrupt", "kv_exhausted"})
ENGINE_FAULTS = frozenset({"engine_failed", "serving_failed"})
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


class Fault(Enum):
    """Whose fault it is that a stream failed on a worker."""

    REQUEST = auto()  # it would fail anywhere
    PAIR = auto()  # the link between two workers: neither of them is to blame
    WORKER = auto()
    NOBODY = auto()


def fault(code: str, split: bool) -> Fault:
    """Judge by the code of the failure; `split` says that two workers were at it."""
    if code in OWN_FAULTS:
        return Fault.REQUEST
    if code in FAILED_HANDOFFS:
        return Fault.PAIR if split else Fault.NOBODY
    return Fault.WORKER if code in ENGINE_FAULTS else Fault.NOBODY


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverySettings:
    """Limits of waiting and of trust. A pair's breaker opens at its first failure: others are there instead.

    `try_paths` says that new workers hand a canary's KV over before a client's request has to (`policy.kv_paths`)."""

    deadlines: Deadlines = field(default_factory=Deadlines)
    worker: BreakerSettings = field(default_factory=BreakerSettings)
    pair: BreakerSettings = field(default_factory=lambda: BreakerSettings(failures=1))
    try_paths: bool = False
