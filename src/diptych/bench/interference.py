"""What long prompts do to streams that are already running, split and un-split.

Three streams run. After a calm phase, prompts arrive at a fixed interval (the disturbed phase); when the
last of them has been answered, a second calm phase follows, so that what grows with the streams' length
does not count as disturbance. A gap that touches the disturbed phase counts as disturbed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diptych.bench.checkpoint import VOCAB_SIZE
from diptych.bench.load import Exchange, LoadClient, LoadRequest, clock, completion_request, outcome_of
from diptych.bench.metrics import (
    Fields,
    Gap,
    Outcome,
    distribution,
    gaps_touching,
    gaps_within,
    random_prompts,
    token_gaps,
)
from diptych.bench.server import ServerError, System, diptych_server
from diptych.bench.serving import SERVED_NAME, SPLIT, LoadPlan, make_requests, warm_up

UNSPLIT = System("un-split: 1 mixed", ("--prefill", "0", "--decode", "0", "--mixed", "1"))
SYSTEMS = (UNSPLIT, SPLIT)
STREAM_PROMPT_LEN = 32
STREAM_OUTPUT_LEN = 4000
STALLED = 1.0  # seconds: a running stream that was silent for so long at the end has stalled


@dataclass(frozen=True, slots=True, kw_only=True)
class InterferencePlan:
    """Times in seconds. `num_trials` of each system, in turns."""

    num_trials: int = 3
    num_streams: int = 3
    num_prompts: int = 14
    interval: float = 0.6
    input_len: int = 1024
    output_len: int = 16
    settle: float = 2.0
    calm: float = 4.0  # before the disturbance, and again after it


@dataclass(frozen=True, slots=True)
class Trial:
    """One run against one system. All times are seconds from the arrival of the first prompt."""

    system: System
    gaps: tuple[Gap, ...]
    start: float
    disturbed_end: float
    end: float
    outcomes: tuple[Outcome, ...]  # of the prompts
    stream_failures: tuple[str, ...]

    @property
    def calm_gaps(self) -> list[Gap]:
        before = gaps_within(self.gaps, self.start, 0.0)
        return before + gaps_within(self.gaps, self.disturbed_end, self.end)

    @property
    def disturbed_gaps(self) -> list[Gap]:
        return gaps_touching(self.gaps, 0.0, self.disturbed_end)


async def measure_interference(model: Path, plan: InterferencePlan) -> list[Trial]:
    """All trials, systems in turns, one server at a time. Raises ServerError."""
    return [
        await _run_trial(model, system, plan, seed=1 + number)
        for number in range(plan.num_trials)
        for system in SYSTEMS
    ]


def summarize_trials(trials: Sequence[Trial], plan: InterferencePlan) -> Fields:
    """Figures per system, the trials' gaps pooled, for results.json."""
    names = list(dict.fromkeys(trial.system for trial in trials))
    of_system = {system: [trial for trial in trials if trial.system == system] for system in names}
    return {**asdict(plan), "systems": [_summarize_system(system, of_system[system]) for system in names]}


def _summarize_system(system: System, trials: Sequence[Trial]) -> Fields:
    outcomes = [outcome for trial in trials for outcome in trial.outcomes]
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    return {
        "system": system.name,
        "flags": " ".join(system.flags),
        "calm": _phase([trial.calm_gaps for trial in trials]),
        "disturbed": _phase([trial.disturbed_gaps for trial in trials]),
        **distribution("prompt_ttft", [o.timeline.ttft for o in outcomes if o.failure is None and o.timeline.ttft]),
        "routes": dict(Counter(outcome.route for outcome in outcomes if outcome.failure is None)),
        "failures": dict(Counter(failures)),
        "stream_failures": dict(Counter(failure for trial in trials for failure in trial.stream_failures)),
    }


def _phase(gaps_per_trial: Sequence[Sequence[Gap]]) -> Fields:
    """Pooled, and the p99 of each trial alone, which shows how far trials agree."""
    pooled = [gap.seconds for gaps in gaps_per_trial for gap in gaps]
    alone: list[Any] = [distribution("itl", [gap.seconds for gap in gaps])["p99_itl_ms"] for gaps in gaps_per_trial]
    return {"num_gaps": len(pooled), **distribution("itl", pooled), "p99_itl_ms_of_trials": alone}


async def _run_trial(model: Path, system: System, plan: InterferencePlan, seed: int) -> Trial:
    load = LoadPlan(
        request_rate=1 / plan.interval,
        num_prompts=plan.num_prompts,
        input_len=plan.input_len,
        output_len=plan.output_len,
        seed=seed,
    )
    arrivals = [number * plan.interval for number in range(plan.num_prompts)]
    prompts = make_requests(load)
    with diptych_server(model, system, SERVED_NAME) as server:
        async with LoadClient(server.url) as client:
            await warm_up(client, load)
            async with client.streaming(_stream_requests(plan, seed)) as streams:
                await asyncio.sleep(plan.settle)
                start = clock()
                await asyncio.sleep(plan.calm)
                disturbances = await client.offer(prompts, arrivals)
                await asyncio.sleep(plan.calm)
                end = clock()
    return judge(system, streams, disturbances, (start, end))


def judge(
    system: System, streams: Sequence[Exchange], disturbances: Sequence[Exchange], span: tuple[float, float]
) -> Trial:
    """What the exchanges of one trial say; `span` is when measuring began and ended.

    Raises:
        ServerError: the streams gave no token in that time.
    """
    zero = disturbances[0].due
    outcomes = [outcome_of(stream) for stream in streams]
    gaps = [gap for outcome in outcomes for gap in token_gaps([t - zero for t in outcome.timeline.token_times])]
    start, end = (moment - zero for moment in span)
    if not gaps_touching(gaps, start, end):
        raise ServerError(f"the streams gave no tokens: {[outcome.failure for outcome in outcomes]}")
    return Trial(
        system=system,
        gaps=tuple(gaps_within(gaps, start, end)),
        start=start,
        disturbed_end=max(exchange.finished or exchange.due for exchange in disturbances) - zero,
        end=end,
        outcomes=tuple(map(outcome_of, disturbances)),
        stream_failures=tuple(filter(None, (_stream_failure(outcome, span[1]) for outcome in outcomes))),
    )


def _stream_failure(outcome: Outcome, end: float) -> str | None:
    """Also a stream that was cut off at `end` must have been alive until then: its last gap has no end."""
    timeline = outcome.timeline
    last_sign = timeline.token_times[-1] if timeline.token_times else timeline.arrived
    if outcome.failure is None and timeline.finished is None and end - last_sign > STALLED:
        return "stalled"
    return outcome.failure


def _stream_requests(plan: InterferencePlan, seed: int) -> list[LoadRequest]:
    prompts = random_prompts(plan.num_streams, STREAM_PROMPT_LEN, VOCAB_SIZE, seed=1000 + seed)
    return [completion_request(SERVED_NAME, prompt, STREAM_OUTPUT_LEN) for prompt in prompts]
