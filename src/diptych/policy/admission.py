"""Whether a request may come in at all, before any work is spent on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from diptych.core.errors import OverloadedError, UnavailableError
from diptych.core.fleet import WorkerState, WorkerView

RESTART_SECONDS = 5.0  # what a worker of ours takes to come back, in round figures


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """At most `max_requests` streams live in the router at once."""

    max_requests: int = 1024


def refusal(
    num_live: int, queued_tokens: int, workers: Iterable[WorkerView], limits: AdmissionLimits
) -> OverloadedError | None:
    """Why a request cannot come in now, with an estimate (seconds) of when to try again; None if it can."""
    ready = [worker for worker in workers if worker.state is WorkerState.READY]
    if not ready:
        return UnavailableError("no worker is ready to serve requests", retry_after=RESTART_SECONDS)
    if num_live >= limits.max_requests:
        rate = sum(worker.stats.prefill_rate for worker in ready)
        drain = queued_tokens / rate if rate else 1.0
        message = f"{num_live} requests are being served or wait, the limit is {limits.max_requests}"
        return OverloadedError(message, retry_after=max(1.0, drain))
    return None
