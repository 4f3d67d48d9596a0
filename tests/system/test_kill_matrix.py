"""A slice of the kill matrix (`make kill-matrix` runs all of it): real processes, a signal in the middle of things."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from diptych.bench.faults.kill_matrix import PHASES, Cell, Phase, boundary_cells, phase_cells
from diptych.bench.faults.runner import Outcome, run_all

PARALLEL = 4
SLICE = (
    "last chunk sent / prefill / STOP",  # the slow ones first
    "mid decode / router / STOP",
    "mid decode / decode / KILL",
    "mid transfer / router / KILL",
    "ticket minted / decode / TERM",
    "verified, not accepted / decode / KILL",
    "ack lost / prefill / KILL",
    "mid decode / router / TERM",
    "layer 3 of 8 sent (tcp) / prefill / KILL",
)


@pytest.fixture(scope="module")
def outcomes(short_directory: Path) -> dict[str, Outcome]:
    """All cells of the slice, several at a time."""
    cells = {cell.name: cell for cell in (*phase_cells(), *boundary_cells())}
    wanted = [cells[name] for name in SLICE]
    return {outcome.name: outcome for outcome in asyncio.run(run_all(wanted, PARALLEL, short_directory))}


@pytest.mark.fault(29, 30, 31, 32, 34, 36, 37)
@pytest.mark.parametrize("name", SLICE)
def test_nothing_is_lost(outcomes: dict[str, Outcome], name: str) -> None:
    assert outcomes[name].violation == "", outcomes[name].what


def test_the_matrix_is_whole() -> None:
    cells = [*phase_cells(), *boundary_cells()]
    assert len({cell.name for cell in cells}) == len(cells)
    for victim in ("prefill", "decode", "router"):
        for signum in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
            assert {cell.phase for cell in cells if (cell.victim, cell.signum) == (victim, signum)} >= set(PHASES)


@pytest.mark.timeout(200)
def test_a_phase_that_never_comes_is_a_violation(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix can fail."""
    monkeypatch.setattr("diptych.bench.faults.kill_matrix.PHASE_SECONDS", 3.0)
    nowhere = Phase("nowhere", "prefill", "no.such.place")
    [outcome] = asyncio.run(run_all([Cell(nowhere, "prefill", signal.SIGKILL)], 1, short_directory / "never"))
    assert outcome.violation == "the phase was never reached"
