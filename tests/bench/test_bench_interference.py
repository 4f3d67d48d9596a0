import asyncio

import pytest
from bench_fakes import DONE_EVENT, event

from diptych.bench.interference import InterferencePlan, judge, summarize_trials
from diptych.bench.load import Exchange, completion_request
from diptych.bench.picture import draw_interference, median_trial
from diptych.bench.server import ServerError, System
from diptych.bench.serving import LoadPlan, measure_serving

SPLIT, UNSPLIT = System("split", ("--prefill", "1")), System("un-split", ("--mixed", "1"))
STREAM = completion_request("fake", [1, 2], 4000)
PROMPT = completion_request("fake", [3] * 8, 1)
PLAN = InterferencePlan(num_trials=1, num_prompts=2, calm=2.0)


def stream(times, **end):
    return Exchange(STREAM, due=times[0], sent=times[0], pieces=[(when, event([5])) for when in times], **end)


def prompt(due, finished):
    return Exchange(PROMPT, due, due, [(finished, event([5]) + DONE_EVENT)], finished)


def trial_of(streams, system=SPLIT):
    """Calm from 98 to 100, prompts from 100 to 101.5, calm again until 103.5."""
    return judge(system, streams, [prompt(100.0, 101.0), prompt(100.6, 101.5)], (98.0, 103.5))


def test_gaps_belong_to_their_phases():
    trial = trial_of([stream([97.0, 98.5, 99.0, 100.5, 101.0, 102.0, 102.25, 103.25, 104.0])])
    assert [gap.seconds for gap in trial.calm_gaps] == [0.5, 0.25, 1.0]
    assert [gap.seconds for gap in trial.disturbed_gaps] == [1.5, 0.5, 1.0]
    assert trial.stream_failures == ()
    assert trial.disturbed_end == 1.5


def test_a_stream_that_fell_silent_is_reported_though_its_last_gap_has_no_end():
    trial = trial_of([stream([97.0, 99.0, 100.5]), stream([97.0, 99.0, 103.0])])
    assert trial.stream_failures == ("stalled",)


def test_a_stream_that_ended_too_early_is_reported():
    trial = trial_of([stream([97.0, 99.0, 100.5], finished=100.6)])
    assert trial.stream_failures == ("stream: truncated",)


def test_streams_without_a_token_are_no_measurement():
    with pytest.raises(ServerError, match="no tokens"):
        trial_of([Exchange(STREAM, due=97.0)])


def test_summary_pools_trials_and_shows_each():
    fast = trial_of([stream([98.0, 98.1, 99.9, 100.2, 101.6, 103.4])])
    slow = trial_of([stream([98.0, 99.9, 101.6, 103.4])])
    summary = summarize_trials([fast, slow, trial_of([stream([98.0, 99.0])], UNSPLIT)], PLAN)
    split, unsplit = summary["systems"]
    assert (split["system"], unsplit["system"]) == ("split", "un-split")
    assert split["disturbed"]["num_gaps"] == 3
    assert split["disturbed"]["max_itl_ms"] == pytest.approx(1700)
    assert len(split["disturbed"]["p99_itl_ms_of_trials"]) == 2
    assert unsplit["disturbed"]["p99_itl_ms"] is None
    assert unsplit["stream_failures"] == {"stalled": 1}
    assert split["median_prompt_ttft_ms"] == pytest.approx(950)


def test_the_picture_shows_the_trial_in_the_middle():
    trials = [trial_of([stream([99.0, 100.1 + length])]) for length in (0.5, 0.1, 0.9)]
    assert median_trial(trials) is trials[0]
    assert median_trial(trials[:2]) is trials[1]


@pytest.mark.parametrize("name", ["picture.png", "picture.svg"])
def test_the_picture_is_drawn_even_where_a_phase_is_empty(tmp_path, name):
    trials = [trial_of([stream([98.0, 98.1, 99.9, 100.2, 100.2, 103.4])]), trial_of([stream([98.0, 99.0])], UNSPLIT)]
    draw_interference(trials, PLAN, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 5000


def test_a_real_server_under_load(tmp_path):
    scripted = System("scripted", ("--engine", "scripted", "--prefill", "1", "--decode", "1"))
    plan = LoadPlan(request_rate=20, num_prompts=10, input_len=64, output_len=8, vocab_size=128)
    figures = asyncio.run(measure_serving(tmp_path, scripted, plan))
    assert figures["failures"] == {}
    assert (figures["completed"], figures["total_output_tokens"]) == (10, 80)
    assert sum(figures["routes"].values()) == 10
