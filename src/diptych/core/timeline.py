"""The life of a request in timestamps, and the latencies that follow from it.

Definitions (the field's standard terms): TTFT is arrival to first token; ITL is each gap between
consecutive tokens; TPOT is (E2E - TTFT) / (output tokens - 1), undefined for a single token.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Timeline:
    """Timestamps in seconds of one monotonic clock (the router's); None until they happen.

    `queue_seconds` (the router's queue and the worker's) and `prefill_seconds` are durations; the worker that
    prefilled measures its own, since clocks of two machines cannot be compared. `split` says that another
    worker decodes.
    """

    arrived: float
    split: bool = False
    dispatched: float | None = None
    first_token: float | None = None
    second_token: float | None = None
    finished: float | None = None
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    token_times: list[float] = field(default_factory=list)

    def token(self, now: float) -> None:
        """Record one output token."""
        if self.first_token is None:
            self.first_token = now
        elif self.second_token is None:
            self.second_token = now
        self.token_times.append(now)

    @property
    def queued(self) -> float:
        """Seconds between arrival and dispatch; 0 until that."""
        return 0.0 if self.dispatched is None else self.dispatched - self.arrived

    @property
    def ttft(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def e2e(self) -> float | None:
        return None if self.finished is None else self.finished - self.arrived

    @property
    def itl(self) -> list[float]:
        times = self.token_times
        return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)

    def server_timing(self) -> dict[str, float]:
        """Seconds per phase, for the `Server-Timing` header: queue, prefill, handoff, decode.

        `handoff`, of a split request, is the gap between its first and its second token: the part of the
        transfer that was not hidden, plus the first decode step. Only phases that have happened are present.
        """
        phases: dict[str, float] = {}
        if self.queue_seconds is not None:
            phases["queue"] = self.queue_seconds
        if self.prefill_seconds is not None:
            phases["prefill"] = self.prefill_seconds
        if self.first_token is not None and self.second_token is not None:
            decoding_since = self.first_token
            if self.split:
                phases["handoff"] = self.second_token - self.first_token
                decoding_since = self.second_token
            phases["decode"] = self.token_times[-1] - decoding_since
        return phases
