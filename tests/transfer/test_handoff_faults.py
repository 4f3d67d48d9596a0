"""A slice of the fault campaign (`make handoff-faults N=10000` runs more)."""

from __future__ import annotations

from pathlib import Path

from handoff_faults import KINDS, run


def test_no_injected_fault_is_served(tmp_path: Path) -> None:
    tallies = run(360, 7, tmp_path)
    assert sum(tally.injected for tally in tallies.values()) == 360
    assert set(tallies) == set(KINDS)
    assert all(tally.injected >= 8 for tally in tallies.values())
