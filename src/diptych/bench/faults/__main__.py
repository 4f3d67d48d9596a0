"""All faults on real processes: the kill matrix and the spoiled connections.

    python -m diptych.bench.faults [--only TEXT] [--parallel 4] [--json FILE]

Exit status 1 if something happened that must not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from diptych.bench.faults.kill_matrix import boundary_cells, grid, phase_cells
from diptych.bench.faults.link_faults import link_cases
from diptych.bench.faults.runner import Case, run_all


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    parser.add_argument("--parallel", type=int, default=4, help="fleets at a time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    everything: list[Case] = [*link_cases(), *phase_cells(), *boundary_cells()]  # those that take longest come first
    cases = [case for case in everything if arguments.only in case.name]
    directory = Path(tempfile.mkdtemp(prefix="diptych-faults-"))
    outcomes = asyncio.run(run_all(cases, arguments.parallel, directory))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([outcome.fields() for outcome in outcomes], indent=2) + "\n")
    violated = [outcome for outcome in outcomes if outcome.violation]
    print(f"\nLongest wait of a client by phase, victim and signal:\n{grid(outcomes)}\n")
    print(f"{len(outcomes)} cases, {len(violated)} violated")
    sys.exit(1 if violated else 0)


if __name__ == "__main__":
    main()
