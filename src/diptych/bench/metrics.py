"""Arithmetic of the measurements: pure functions on timestamps and durations (seconds in, milliseconds out).

Names of fields are those of `vllm bench serve`, so that results can be laid side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diptych.core.timeline import Timeline

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request went, as its client saw it.

    `timeline.arrived` is when the request was due, not when it was sent, so that a client that is late
    makes latencies longer and not shorter; `lag` is how late it was, in seconds. `failure` is None if
    the answer is whole. `server_timing` is what the server says of itself, in milliseconds per phase.
    """

    timeline: Timeline
    lag: float
    num_prompt_tokens: int
    failure: str | None = None
    route: str = ""
    server_timing: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gap:
    """Time between two consecutive tokens of one stream; `end` is when the later one arrived."""

    end: float
    seconds: float

    @property
    def start(self) -> float:
        return self.end - self.seconds


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """When `count` requests arrive, in seconds from the start, at `rate` per second on average.

    Gaps are exponential, then stretched so that the last request arrives at exactly `count / rate`:
    every seed offers the same load.
    """
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(size=count))
    return [float(time) for time in arrivals / arrivals[-1] * (count / rate)]


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of uniformly random token ids; no two share a prefix worth caching."""
    tokens: list[list[int]] = np.random.default_rng(seed).integers(0, vocab_size, size=(count, length)).tolist()
    return tokens


def token_gaps(token_times: Sequence[float]) -> list[Gap]:
    """Gaps between consecutive tokens. Tokens that arrive together have gaps of zero between them."""
    return [Gap(later, later - earlier) for earlier, later in zip(token_times, token_times[1:], strict=False)]


def gaps_touching(gaps: Iterable[Gap], start: float, end: float) -> list[Gap]:
    """The gaps of which any part lies in the phase from `start` to `end`."""
    return [gap for gap in gaps if gap.end > start and gap.start < end]


def gaps_within(gaps: Iterable[Gap], start: float, end: float) -> list[Gap]:
    """The gaps that lie wholly in the phase from `start` to `end`."""
    return [gap for gap in gaps if gap.start >= start and gap.end <= end]


def distribution(name: str, seconds: Sequence[float]) -> Fields:
    """Mean, median, p90, p99 and maximum in milliseconds (linear interpolation); None without values."""
    statistics = {"mean": np.mean, "median": np.median, "p90": _percentile(90), "p99": _percentile(99), "max": np.max}
    return {
        f"{statistic}_{name}_ms": round(float(function(seconds)) * 1000, 3) if len(seconds) else None
        for statistic, function in statistics.items()
    }


def summarize(outcomes: Sequence[Outcome]) -> Fields:
    """The figures of one load run. Latencies are those of whole answers; failures are counted by kind.

    `duration` goes from the first request's due time to the end of the last answer.
    """
    whole = [outcome for outcome in outcomes if outcome.failure is None]
    timelines = [outcome.timeline for outcome in whole]
    ends = [outcome.timeline.finished for outcome in outcomes if outcome.timeline.finished is not None]
    duration = max(ends) - min(outcome.timeline.arrived for outcome in outcomes) if ends else 0.0
    input_tokens = sum(outcome.num_prompt_tokens for outcome in whole)
    output_tokens = sum(len(timeline.token_times) for timeline in timelines)
    return {
        "num_prompts": len(outcomes),
        "completed": len(whole),
        "failed": len(outcomes) - len(whole),
        "failures": dict(Counter(outcome.failure for outcome in outcomes if outcome.failure is not None)),
        "routes": dict(Counter(outcome.route for outcome in whole)),
        "duration": round(duration, 3),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        **_throughput(len(whole), input_tokens, output_tokens, duration),
        **distribution("ttft", [timeline.ttft for timeline in timelines if timeline.ttft is not None]),
        **distribution("tpot", [timeline.tpot for timeline in timelines if timeline.tpot is not None]),
        **distribution("itl", [gap for timeline in timelines for gap in timeline.itl]),
        **distribution("e2el", [timeline.e2e for timeline in timelines if timeline.e2e is not None]),
        **server_phases(whole),
        "max_client_lag_ms": round(max((outcome.lag for outcome in outcomes), default=0.0) * 1000, 3),
    }


def server_phases(outcomes: Sequence[Outcome]) -> Fields:
    """Mean of each phase that the server reported with its first byte, in milliseconds."""
    names = sorted({name for outcome in outcomes for name in outcome.server_timing})
    means: Fields = {}
    for name in names:
        values = [outcome.server_timing[name] for outcome in outcomes if name in outcome.server_timing]
        means[f"mean_server_{name}_ms"] = round(float(np.mean(values)), 3)
    return means


def cpu_percent(before: dict[int, float], after: dict[int, float], seconds: float) -> float:
    """CPU time used between two readings, of all processes together, in percent of one core.

    Args:
        before, after: CPU seconds by process id. A process that is only in `after` counts from zero.
    """
    used = sum(after[pid] - before.get(pid, 0.0) for pid in after)
    return 100 * used / seconds


def _percentile(percent: float) -> Any:
    return lambda values: np.percentile(values, percent)


def _throughput(completed: int, input_tokens: int, output_tokens: int, duration: float) -> Fields:
    def per_second(amount: int) -> float:
        return round(amount / duration, 3) if duration > 0 else 0.0

    return {
        "request_throughput": per_second(completed),
        "output_throughput": per_second(output_tokens),
        "total_token_throughput": per_second(input_tokens + output_tokens),
    }
