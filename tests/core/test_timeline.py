from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.timeline import Timeline


def test_nothing_is_known_before_it_happens() -> None:
    timeline = Timeline(arrived=1.0)
    assert (timeline.ttft, timeline.e2e, timeline.tpot, timeline.itl) == (None, None, None, [])
    assert timeline.server_timing() == {}


def test_phases_of_a_split_request() -> None:
    timeline = Timeline(arrived=10.0, split=True, queue_seconds=0.5, prefill_seconds=2.0)
    for now in (13.0, 13.25, 13.5, 14.5):
        timeline.token(now)
    timeline.finished = 15.0
    assert timeline.ttft == 3.0
    assert timeline.e2e == 5.0
    assert timeline.itl == [0.25, 0.25, 1.0]
    assert timeline.tpot == 0.5
    assert timeline.server_timing() == {"queue": 0.5, "prefill": 2.0, "handoff": 0.25, "decode": 1.25}


def test_a_request_served_by_one_worker_has_no_handoff() -> None:
    timeline = Timeline(arrived=0.0, queue_seconds=0.0, prefill_seconds=1.0)
    for now in (1.0, 1.5, 2.0):
        timeline.token(now)
    assert timeline.server_timing() == {"queue": 0.0, "prefill": 1.0, "decode": 1.0}


def test_one_token_has_no_pace() -> None:
    timeline = Timeline(arrived=0.0, queue_seconds=0.0)
    timeline.token(1.0)
    assert (timeline.tpot, timeline.itl, timeline.second_token) == (None, [], None)
    assert timeline.server_timing() == {"queue": 0.0}


@given(gaps=st.lists(st.floats(0, 10), min_size=2, max_size=20))
def test_pace_is_the_mean_gap(gaps: list[float]) -> None:
    timeline = Timeline(arrived=0.0)
    now = 0.0
    for gap in gaps:
        now += gap
        timeline.token(now)
    assert len(timeline.itl) == len(gaps) - 1
    assert timeline.tpot == pytest.approx(sum(timeline.itl) / len(timeline.itl))
    assert timeline.ttft == timeline.token_times[0]
