"""Every measurement, one after the other, and the report.

    python -m diptych.bench.all --out benchmarks [--quick] [--only serving,idle]

Writes results.json, results.md and interference.png. A part that fails is reported, the others are still
measured, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from diptych.bench.idle import measure_idle
from diptych.bench.interference import InterferencePlan, measure_interference, summarize_trials
from diptych.bench.metrics import Fields
from diptych.bench.report import fingerprint, write_report
from diptych.bench.server import ServerError, System
from diptych.bench.serving import SPLIT, UNSPLIT_PAIR, LoadPlan, measure_serving

T = TypeVar("T")

TERMINATED = 128 + signal.SIGTERM  # as a shell reports it

# Before torch is loaded anywhere: threads that wait must sleep.
PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    engine_rounds: int = 3
    loads: tuple[LoadPlan, ...] = (LoadPlan(request_rate=1, num_prompts=60), LoadPlan(request_rate=2, num_prompts=100))
    interference: InterferencePlan = field(default_factory=InterferencePlan)
    idle_seconds: float = 20.0


FULL = Plan()
QUICK = Plan(
    engine_rounds=1,
    loads=(LoadPlan(request_rate=1, num_prompts=15),),
    interference=replace(FULL.interference, num_trials=1, num_prompts=8, calm=2.0),
    idle_seconds=5.0,
)


@dataclass(frozen=True, slots=True)
class Run:
    """What a part needs to know: where the served model lies, what to measure, where output goes."""

    model: Path
    plan: Plan
    out: Path


def engine(run: Run) -> Fields:
    """Our engine beside `transformers`, in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        _python("-m", "diptych.bench.engine_bench", "--rounds", str(run.plan.engine_rounds), "--json", output.name)
        report: Fields = json.loads(Path(output.name).read_text(encoding="utf-8"))
        return report


def serving(run: Run) -> list[Fields]:
    """Every load against split and un-split servers of two workers, in turns."""
    systems: tuple[System, ...] = (SPLIT, UNSPLIT_PAIR)
    return [_await(measure_serving(run.model, system, load)) for load in run.plan.loads for system in systems]


def interference(run: Run) -> Fields:
    """Streams disturbed by long prompts, and the picture of it."""
    from diptych.bench.picture import draw_interference

    plan = run.plan.interference
    trials = _await(measure_interference(run.model, plan))
    draw_interference(trials, plan, run.out / "interference.png")
    return summarize_trials(trials, plan)


def idle(run: Run) -> list[Fields]:
    """CPU time of a server that nobody uses."""
    return [_await(measure_idle(run.model, SPLIT, run.plan.idle_seconds))]


PARTS: dict[str, Callable[[Run], Any]] = {
    "engine": engine,
    "serving": serving,
    "interference": interference,
    "idle": idle,
}


def measure(names: list[str], run: Run, command: str) -> Fields:
    """Run the named parts; returns what goes into results.json. Failures are under `errors`, by part."""
    results: Fields = {"machine": fingerprint(command), "errors": {}}
    for name in names:
        began = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            results[name] = PARTS[name](run)
        except (ServerError, OSError, subprocess.CalledProcessError) as error:
            results["errors"][name] = str(error)
            print(f"{name} failed: {error}", file=sys.stderr)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return results


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # an orderly end, which ends the servers too
    command = " ".join(["python -m diptych.bench.all", *(sys.argv[1:] if arguments is None else arguments)])
    with tempfile.TemporaryDirectory(prefix="diptych-bench-") as directory:
        _python("-m", "diptych.bench.checkpoint", directory)
        options.out.mkdir(parents=True, exist_ok=True)
        run = Run(Path(directory), QUICK if options.quick else FULL, options.out)
        results = measure(options.only, run, command)
    write_report(results, options.out)
    print((options.out / "results.md").read_text(encoding="utf-8"))
    sys.exit(1 if results["errors"] else 0)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="directory for results and picture")
    parser.add_argument("--quick", action="store_true", help="less of everything: under 3 minutes, not for quoting")
    parser.add_argument("--only", type=_part_names, default=list(PARTS), help=f"of {','.join(PARTS)}")
    return parser.parse_args(arguments)


def _part_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown part {min(unknown)!r}; known are {', '.join(PARTS)}")
    return names


def _python(*arguments: str) -> None:
    subprocess.run((sys.executable, *arguments), check=True, stdout=sys.stderr, env={**os.environ, **PASSIVE})


def _await(coroutine: Coroutine[Any, Any, T]) -> T:
    return uvloop.run(coroutine)


if __name__ == "__main__":
    main()
