"""Histories with faults: seeded ones, and those that have found something before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from diptych.bench.fault_sim import play_seeds
from diptych.sim.scenario import Scenario, draw
from diptych.sim.world import World

HISTORIES = 2000
PER_TEST = 200
REGRESSIONS = Path(__file__).with_name("regressions.jsonl").read_bytes().splitlines()

FINGERPRINTS = """
from diptych.sim.scenario import draw
from diptych.sim.world import World
for seed in range(40):
    outcome = World(draw(seed)).run()
    print(seed, outcome.events, outcome.seconds, outcome.attempts, outcome.handoffs, outcome.violation)
"""


@pytest.mark.fault(29, 30, 31, 32, 34, 36, 39, 40, 41, 43, 46, 48, 50, 53)
@pytest.mark.parametrize("first", range(0, HISTORIES, PER_TEST))
def test_no_history_violates_an_invariant(first: int) -> None:
    tally = play_seeds(range(first, first + PER_TEST))
    assert tally.violations == []
    assert tally.faults
    assert tally.handoffs
    assert tally.rows_dropped
    assert tally.retried


@pytest.mark.parametrize("line", REGRESSIONS, ids=range(len(REGRESSIONS)))
def test_what_has_been_found_once_stays_mended(line: bytes) -> None:
    assert World(msgspec.json.decode(line, type=Scenario)).run().violation is None


def test_a_seed_is_the_same_history_everywhere() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-c", FINGERPRINTS],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert told[0] == told[1]


def test_a_scenario_survives_being_written_down() -> None:
    scenario = draw(5)
    assert msgspec.json.decode(msgspec.json.encode(scenario), type=Scenario) == scenario
