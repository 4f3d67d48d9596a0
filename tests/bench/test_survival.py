from __future__ import annotations

import asyncio

import pytest

from diptych.bench.survival import NUM_CLIENTS, SCENARIOS, Tally, measure


@pytest.mark.fault(33)
@pytest.mark.fault(30, 32)
@pytest.mark.parametrize("name", ["one-decode", "everything"])
def test_killed_workers_change_no_answer(name: str) -> None:
    fields = asyncio.run(measure(SCENARIOS[name], num_requests=6))
    assert fields["requests"] == fields["identical"] == 6 * NUM_CLIENTS
    assert fields["failures"] == {}
    assert fields["workers_killed"] == (4 if name == "everything" else 1)


def test_what_fails_is_named() -> None:
    tally = Tally(refusals=3, unsplit=1, killed=1)
    tally.ends.update({"identical": 2, "HTTP 500": 1})
    tally.pauses += [0.1, 0.2, 0.3]
    assert tally.fields("one-prefill") == {
        "scenario": "one-prefill",
        "workers_killed": 1,
        "requests": 3,
        "identical": 2,
        "failures": {"HTTP 500": 1},
        "refusals": 3,
        "unsplit": 1,
        "p99_longest_pause_ms": 200.0,
        "max_longest_pause_ms": 300.0,
    }
