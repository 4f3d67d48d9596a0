"""How long a stream may wait for what, in the router. Every wait has an error code of its own: `<wait>_timeout`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

TOTAL_TIMEOUT = "request_timeout"


class Wait(StrEnum):
    """What a stream waits for now."""

    QUEUE = "queue"  # a worker: it runs nowhere
    RESERVE = "reserve"  # the decode worker's ticket
    FIRST_TOKEN = "first_token"  # the first token of this attempt
    STALL = "stall"  # the next token

    @property
    def code(self) -> str:
        return f"{self}_timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds. All but `total` are about one wait.

    Attributes:
        queue: without a worker. Then the stream ends.
        reserve, first_token, stall: of an attempt. Then the log is continued elsewhere. If there is nobody else
            it stays where it is, and ends once it has waited for another `queue` seconds.
        total: of a request, whatever happens; a client may lower it (`Request.timeout`).
        canary: for a probe to succeed.
        checkpoint: for a copy of a stream's KV to reach the worker that is to keep it.
        drain: that a worker which leaves may keep a stream that cannot be handed over with its KV.
    """

    queue: float = 60.0
    reserve: float = 60.0
    first_token: float = 120.0
    stall: float = 10.0
    total: float = 1800.0
    canary: float = 10.0
    checkpoint: float = 30.0
    drain: float = 20.0

    def of(self, wait: Wait) -> float:
        """How long this wait may be."""
        match wait:
            case Wait.QUEUE:
                return self.queue
            case Wait.RESERVE:
                return self.reserve
            case Wait.FIRST_TOKEN:
                return self.first_token
            case Wait.STALL:
                return self.stall
