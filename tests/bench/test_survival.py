from __future__ import annotations

import asyncio

import pytest

from diptych.bench.survival import NUM_CLIENTS, Tally, measure


@pytest.mark.fault(30, 32)
def test_a_killed_worker_changes_no_answer() -> None:
    fields = asyncio.run(measure("decode", num_requests=6))
    assert fields["requests"] == fields["identical"] == 6 * NUM_CLIENTS
    assert fields["failures"] == {}


def test_what_fails_is_named() -> None:
    tally = Tally()
    tally.ends.update({"identical": 2, "HTTP 503": 1})
    tally.pauses += [0.1, 0.2, 0.3]
    assert tally.fields("prefill") == {
        "killed": "prefill",
        "requests": 3,
        "identical": 2,
        "failures": {"HTTP 503": 1},
        "p99_longest_pause_ms": 200.0,
        "max_longest_pause_ms": 300.0,
    }
