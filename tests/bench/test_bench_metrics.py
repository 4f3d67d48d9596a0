import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.bench.metrics import (
    Gap,
    Outcome,
    cpu_percent,
    distribution,
    gaps_touching,
    gaps_within,
    poisson_arrivals,
    random_prompts,
    summarize,
    token_gaps,
)
from diptych.core.timeline import Timeline


def outcome(arrived, token_times, finished, failure=None, **extra):
    timeline = Timeline(arrived=arrived)
    for when in token_times:
        timeline.token(when)
    timeline.finished = finished
    return Outcome(timeline, extra.pop("lag", 0.0), num_prompt_tokens=100, failure=failure, **extra)


@given(rate=st.floats(0.1, 50), count=st.integers(1, 200), seed=st.integers(0, 100))
def test_arrivals_are_in_order_and_offer_exactly_the_rate(rate, count, seed):
    arrivals = poisson_arrivals(rate, count, seed)
    assert len(arrivals) == count
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(count / rate)
    assert arrivals == poisson_arrivals(rate, count, seed)


def test_arrivals_are_memoryless_and_not_regular():
    arrivals = poisson_arrivals(2.0, 4000, seed=3)
    gaps = [gap.seconds for gap in token_gaps(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation / mean == pytest.approx(1, abs=0.1)  # of an exponential distribution


def test_prompts_are_reproducible_and_share_no_beginning():
    prompts = random_prompts(50, 32, 8192, seed=1)
    assert prompts == random_prompts(50, 32, 8192, seed=1)
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 50
    assert all(0 <= token < 8192 for prompt in prompts for token in prompt)


def test_tokens_that_arrive_together_have_gaps_of_zero():
    assert [gap.seconds for gap in token_gaps([1.0, 1.5, 1.5, 2.5])] == [0.5, 0.0, 1.0]


@given(times=st.lists(st.floats(-10, 10), min_size=2, max_size=40).map(sorted))
def test_phases_share_out_every_gap_once(times):
    gaps = token_gaps(times)
    start, end = min(times), max(times)
    phases = [gaps_within(gaps, start - 1, 0.0), gaps_within(gaps, 5.0, end + 1)]
    disturbed = gaps_touching(gaps, 0.0, 5.0)
    assert sum(map(len, phases)) + len(disturbed) == len(gaps)


def test_a_gap_that_only_begins_in_a_phase_touches_it():
    gap = Gap(end=6.0, seconds=2.0)
    assert gaps_touching([gap], 0.0, 5.0) == [gap]
    assert gaps_within([gap], 0.0, 5.0) == []
    assert gaps_touching([gap], 6.0, 7.0) == []


def test_distribution_is_in_milliseconds_under_the_names_of_vllm_bench():
    fields = distribution("itl", [0.001 * value for value in range(1, 102)])
    assert fields == {
        "mean_itl_ms": 51.0,
        "median_itl_ms": 51.0,
        "p90_itl_ms": 91.0,
        "p99_itl_ms": 100.0,
        "max_itl_ms": 101.0,
    }


def test_distribution_of_nothing_is_not_zero():
    assert set(distribution("ttft", []).values()) == {None}


def test_summary_of_whole_and_failed_requests():
    outcomes = [
        outcome(10.0, [10.4, 10.5, 10.7], 10.7, route="split", server_timing={"queue": 2.0}, lag=0.002),
        outcome(11.0, [11.2], 11.2, route="local", server_timing={"queue": 4.0}),
        outcome(11.5, [11.6], 15.0, failure="stream: worker_lost"),
        outcome(11.6, [], 11.7, failure="HTTP 429 queue_full"),
    ]
    figures = summarize(outcomes)
    assert (figures["num_prompts"], figures["completed"], figures["failed"]) == (4, 2, 2)
    assert figures["failures"] == {"stream: worker_lost": 1, "HTTP 429 queue_full": 1}
    assert figures["routes"] == {"split": 1, "local": 1}
    assert figures["duration"] == 5.0
    assert figures["total_output_tokens"] == 4
    assert figures["output_throughput"] == 0.8
    assert figures["total_token_throughput"] == pytest.approx(204 / 5)
    assert figures["mean_ttft_ms"] == pytest.approx(300)
    assert figures["mean_tpot_ms"] == pytest.approx(150)  # undefined for the answer of one token
    assert figures["max_itl_ms"] == pytest.approx(200)
    assert figures["mean_e2el_ms"] == pytest.approx(450)
    assert figures["mean_server_queue_ms"] == 3.0
    assert figures["max_client_lag_ms"] == 2.0


def test_summary_when_everything_failed():
    figures = summarize([outcome(1.0, [], 1.5, failure="timeout")])
    assert figures["completed"] == 0
    assert figures["request_throughput"] == 0
    assert figures["p99_ttft_ms"] is None


def test_cpu_percent_counts_processes_that_came_later():
    assert cpu_percent({1: 10.0, 2: 5.0}, {1: 10.5, 2: 5.0, 3: 0.5}, seconds=20.0) == pytest.approx(5.0)
