"""A slice of the spoiled connections (`make kill-matrix` runs all of them): real processes around a fault proxy."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from diptych.bench.faults.link_faults import LinkCase, link_cases
from diptych.bench.faults.runner import Outcome, run_all
from diptych.chaos.proxy import Fault, Spoil

SLICE = (
    "control (tls): black hole down",
    "control (tls): partition both for 3 s",
    "data: flip up at byte 3000",
    "data: reorder up at byte 4500",
    "data: half-close up at byte 3000",
    "data (tls): lose up at byte 3000",
    "control (tls): flip down at byte 20",
)


@pytest.fixture(scope="module")
def outcomes(short_directory: Path) -> dict[str, Outcome]:
    """All cases of the slice, several at a time."""
    cases = {case.name: case for case in link_cases()}
    results = asyncio.run(run_all([cases[name] for name in SLICE], 4, short_directory))
    return {outcome.name: outcome for outcome in results}


@pytest.mark.fault(39, 40, 42, 43)
@pytest.mark.parametrize("name", SLICE)
def test_no_answer_is_lost_or_wrong(outcomes: dict[str, Outcome], name: str) -> None:
    assert outcomes[name].violation == "", outcomes[name].what


def test_names_tell_cases_apart() -> None:
    names = [case.name for case in link_cases()]
    assert len(set(names)) == len(names)


def test_a_fault_that_strikes_nothing_is_a_violation(short_directory: Path) -> None:
    """The cases can fail."""
    never = LinkCase("data", Spoil(Fault.FLIP, after=1 << 30))
    [outcome] = asyncio.run(run_all([never], 1, short_directory / "never"))
    assert outcome.violation == "nothing was spoiled"
