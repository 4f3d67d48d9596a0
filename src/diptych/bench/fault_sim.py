"""Many simulated histories with faults, on all cores: `python -m diptych.bench.fault_sim -n 100000`.

Prints what was run and what struck. A violated invariant is told as a story, made as small as possible, with the
command that repeats it; `--keep FILE` adds it to the regressions that the test suite plays.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from diptych.sim.scenario import Scenario, draw
from diptych.sim.shrink import shrink
from diptych.sim.story import Story, cast
from diptych.sim.world import World

CHUNK = 200  # seeds that a process takes at a time
MAX_TOLD = 3  # violations told in full


@dataclass(slots=True)
class Tally:
    """Sums over histories."""

    histories: int = 0
    events: int = 0
    virtual_seconds: float = 0.0
    requests: int = 0
    finished: int = 0
    attempts: int = 0
    retried: int = 0
    handoffs: int = 0
    rows_dropped: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[tuple[int, str]] = field(default_factory=list)  # seed, what

    def play(self, seed: int) -> None:
        """One history more."""
        outcome = World(draw(seed)).run()
        self.histories += 1
        self.events += outcome.events
        self.virtual_seconds += outcome.seconds
        self.requests += len(outcome.scenario.requests)
        self.finished += outcome.finished
        self.attempts += outcome.attempts
        self.retried += outcome.retried
        self.handoffs += outcome.handoffs
        self.rows_dropped += outcome.rows_dropped
        self.failed += outcome.failed
        self.faults += Counter({str(kind): count for kind, count in outcome.faults.items()})
        if outcome.violation is not None:
            self.violations.append((seed, outcome.violation))

    def add(self, other: Tally) -> None:
        """Sum up."""
        for name in (
            "histories",
            "events",
            "virtual_seconds",
            "requests",
            "finished",
            "attempts",
            "retried",
            "handoffs",
            "rows_dropped",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failed += other.failed
        self.faults += other.faults
        self.violations += other.violations

    def report(self, seconds: float) -> Iterator[str]:
        """The figures, for people."""
        yield (
            f"{self.histories:,} histories, {self.events:,} events of policies, {self.virtual_seconds / 3600:,.1f} "
            f"simulated hours, in {seconds:,.0f} s ({1000 * seconds / max(1, self.histories):.2f} ms each)"
        )
        cut_short = self.requests - self.finished - self.failed.total()
        yield (
            f"{self.requests:,} requests in {self.attempts:,} attempts ({self.retried:,} of them repeated) with "
            f"{self.handoffs:,} hand-offs; {self.rows_dropped:,} rows left running steps: "
            f"{self.finished:,} finished, {cut_short:,} cancelled, {self.failed.total():,} failed as they may"
            + "".join(f", {count:,} {code}" for code, count in self.failed.most_common())
        )
        yield f"{self.faults.total():,} faults: " + ", ".join(
            f"{count:,} {kind}" for kind, count in self.faults.most_common()
        )
        yield f"{len(self.violations):,} violations"


def play_seeds(seeds: range) -> Tally:
    """Several histories, one after the other."""
    tally = Tally()
    for seed in seeds:
        tally.play(seed)
    return tally


def tell(scenario: Scenario) -> Iterator[str]:
    """One history as a story."""
    story = Story()
    outcome = World(scenario, story).run()
    yield from cast(scenario)
    yield from story.tell()
    yield f"violated: {outcome.violation}" if outcome.violation else "nothing is violated"


def _tell_violation(seed: int, keep: Path | None) -> None:
    small = shrink(draw(seed))
    print(f"\nseed {seed}, as small as it gets:")
    print("\n".join(tell(small)))
    print(f"repeat with: make fault-sim SEED={seed}")
    if keep is not None:
        with keep.open("ab") as file:
            file.write(msgspec.json.encode(small) + b"\n")


def _play_all(first: int, count: int, processes: int) -> Tally:
    chunks = [range(start, min(start + CHUNK, first + count)) for start in range(first, first + count, CHUNK)]
    total = Tally()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for number, tally in enumerate(pool.imap_unordered(play_seeds, chunks), 1):
            total.add(tally)
            if sys.stderr.isatty():
                print(f"\r{number} of {len(chunks)}, {len(total.violations)} violations", end="", file=sys.stderr)
    return total


def main() -> int:
    """Returns 1 if an invariant was violated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=2000, help="how many histories")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="tell this one history")
    parser.add_argument("--keep", type=Path, help="append failing scenarios to this file")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.seed is not None:
        failed = World(draw(options.seed)).run().violation is not None
        if failed:
            _tell_violation(options.seed, options.keep)
        else:
            print("\n".join(tell(draw(options.seed))))
        return int(failed)
    began = time.perf_counter()
    total = _play_all(options.first, options.n, options.processes)
    print("\n".join(total.report(time.perf_counter() - began)))
    for seed, _ in sorted(total.violations)[:MAX_TOLD]:
        _tell_violation(seed, options.keep)
    if total.violations:
        print("seeds:", ", ".join(str(seed) for seed, _ in sorted(total.violations)[:50]))
    return int(bool(total.violations))


if __name__ == "__main__":
    sys.exit(main())
