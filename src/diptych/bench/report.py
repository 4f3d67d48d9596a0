"""results.json and results.md: what was measured, where, and by which command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diptych.bench.metrics import Fields

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "numpy", "aiohttp")
DASH = "–"


def fingerprint(command: str) -> Fields:
    """The machine and the software that the figures belong to."""
    return {
        "cpu": cpu_model(Path("/proc/cpuinfo").read_text()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "command": command,
    }


def cpu_model(cpuinfo: str) -> str:
    """The processor's name in the text of /proc/cpuinfo."""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_commit() -> str:
    """The commit that is measured, with `-dirty` if the sources differ from it; "unknown" outside a checkout."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "--", str(HERE.parent)) else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_report(results: Fields, directory: Path) -> None:
    """Write results.json and results.md into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (directory / "results.md").write_text(markdown(results), encoding="utf-8")


def markdown(results: Fields) -> str:
    """The report as one page. Parts that were not measured are left out; parts that failed say so."""
    sections = [_head(results["machine"])]
    writers: dict[str, Callable[[Any], str]] = {
        "engine": _engine,
        "serving": _serving,
        "interference": _interference,
        "idle": _idle,
    }
    for part, write in writers.items():
        if part in results:
            sections.append(write(results[part]))
        if part in results["errors"]:
            sections.append(f"## {part} failed\n\n```\n{results['errors'][part]}\n```")
    return "\n\n".join(sections) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float | None, digits: int = 1) -> str:
    """With thousands separators; a dash for what could not be measured."""
    return DASH if value is None else f"{value:,.{digits}f}"


def counts(kinds: dict[str, int]) -> str:
    """`3 split, 1 local`; a dash for nothing."""
    return ", ".join(f"{count} {kind or 'unknown'}" for kind, count in kinds.items()) or DASH


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", "-C", str(HERE), *arguments), check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _head(machine: Fields) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in PACKAGES)
    return (
        f"# Benchmark results\n\nMade by `{machine['command']}` on {machine['date']}, commit {machine['git_commit']}. "
        "What each figure means: [README.md](README.md); every figure: [results.json](results.json).\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['platform']}, "
        f"Python {machine['python']}, {versions}. The client runs on the same cores as the servers."
    )


def _engine(report: Fields) -> str:
    rows = [
        (
            result["case"]["phase"],
            result["case"]["batch"],
            number(result["case"]["context"], 0),
            number(result["engine"], 0),
            number(result["transformers"], 0),
            f"{result['ratio']:.2f}",
        )
        for result in report["results"]
    ]
    header = ("phase", "batch", "context", "diptych tokens/s", "transformers tokens/s", "ratio")
    return f"## Engine: one worker, {report['threads']} thread\n\n{table(header, rows)}"


def _serving(runs: Sequence[Fields]) -> str:
    columns = ("ttft", "itl", "tpot", "e2el")
    header = ["system", "requests/s", *(f"{name.upper()} p50 / p99 (ms)" for name in columns)]
    header += ["output tokens/s", "done", "failed", "routes", "client late at most (ms)", "client CPU (%)"]
    rows = []
    for run in runs:
        latencies = [f"{number(run[f'median_{name}_ms'])} / {number(run[f'p99_{name}_ms'])}" for name in columns]
        ends = [run["completed"], _failures(run["failed"], run["failures"]), counts(run["routes"])]
        client = [number(run["max_client_lag_ms"]), number(run["client_cpu_percent"])]
        rows.append([run["system"], run["request_rate"], *latencies, number(run["output_throughput"]), *ends, *client])
    lengths = f"{runs[0]['input_len']:,} tokens in, {runs[0]['output_len']} out" if runs else ""
    return f"## Serving: Poisson arrivals, {lengths}\n\n{table(header, rows)}"


def _interference(report: Fields) -> str:
    header = ("system", "phase", "gaps", "median (ms)", "p99 (ms)", "max (ms)", "p99 of each trial (ms)")
    rows, notes = [], []
    for system in report["systems"]:
        for phase in ("calm", "disturbed"):
            figures = system[phase]
            values = [number(figures[f"{name}_itl_ms"]) for name in ("median", "p99", "max")]
            trials = ", ".join(number(value) for value in figures["p99_itl_ms_of_trials"])
            rows.append((system["system"], phase, figures["num_gaps"], *values, trials))
        ttft = f"{number(system['median_prompt_ttft_ms'])} / {number(system['p99_prompt_ttft_ms'])}"
        notes.append(
            f"- {system['system']}: TTFT of the prompts p50 / p99 {ttft} ms; routes {counts(system['routes'])}; "
            f"failed prompts {counts(system['failures'])}; failed streams {counts(system['stream_failures'])}"
        )
    title = (
        f"## Interference: {report['num_streams']} running streams, a prompt of {report['input_len']:,} tokens "
        f"every {report['interval']:g} s, {report['num_trials']} trials"
    )
    return "\n\n".join((title, "![every token gap](interference.png)", table(header, rows), "\n".join(notes)))


def _idle(runs: Sequence[Fields]) -> str:
    header = ("system", "processes", "idle seconds", "CPU, % of one core")
    rows = [
        (run["system"], run["num_processes"], number(run["seconds"], 0), number(run["cpu_percent_of_one_core"], 2))
        for run in runs
    ]
    return f"## Idle\n\n{table(header, rows)}"


def _failures(failed: int, kinds: dict[str, int]) -> str:
    return f"{failed} ({counts(kinds)})" if failed else "0"
