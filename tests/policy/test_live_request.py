"""One stream's log, from wait to wait: who is waited for, who computes it, and what the client is told."""

from __future__ import annotations

from diptych.core.fleet import Route
from diptych.core.request import Request, SampledToken, TokenOutput
from diptych.core.timeline import Timeline
from diptych.policy.deadlines import Wait
from diptych.policy.live_request import PROGRESS_TOKENS, LiveRequest

SPLIT, LOCAL = Route("d", "p", "shm"), Route("m")


def stream() -> LiveRequest:
    return LiveRequest(Request(request_id="r", prompt_token_ids=(1, 2, 3)), Timeline(arrived=0.0), 0.0)


def split_stream() -> LiveRequest:
    live = stream()
    live.begin(SPLIT, 3, 1.0)
    return live


def local_stream() -> LiveRequest:
    live = stream()
    live.begin(LOCAL, 3, 1.0)
    return live


def test_a_split_stream_waits_for_one_worker_after_the_other() -> None:
    live = split_stream()
    assert (live.wait, live.awaited, live.decodes) == (Wait.RESERVE, "d", False)
    assert not live.computes_on("d")  # it only reserves
    assert live.prefill_with(b"ticket", 2.0) is not None
    assert (live.wait, live.awaited, live.decodes) == (Wait.FIRST_TOKEN, "p", False)
    assert (live.computes_on("p"), live.computes_on("d")) == (True, False)
    live.append(7, 3.0)
    assert (live.wait, live.awaited, live.decodes, live.handed_over) == (Wait.STALL, "d", False, False)
    assert (live.needs("p"), live.computes_on("p"), live.computes_on("d")) == (True, False, False)
    live.append(8, 4.0)
    assert (live.awaited, live.decodes, live.handed_over) == ("d", True, True)
    assert (live.needs("p"), live.needs("d"), live.computes_on("d")) == (False, True, True)


def test_a_local_stream_has_all_of_its_kv_with_its_first_token() -> None:
    live = local_stream()
    assert (live.wait, live.awaited, live.decodes, live.computes_on("m")) == (Wait.FIRST_TOKEN, "m", False, True)
    live.append(7, 2.0)
    assert (live.wait, live.awaited, live.decodes, live.computes_on("m")) == (Wait.STALL, "m", True, True)
    assert not live.computes_on("other")
    assert live.prefill_with(b"ticket", 2.0) is None


def test_a_stream_that_was_stopped_waits_for_nobody() -> None:
    live = local_stream()
    live.append(7, 2.0)
    live.early[3] = TokenOutput("r", 3, SampledToken(9))
    live.stop(3.0)
    assert (live.wait, live.wait_since, live.awaited, live.workers) == (Wait.QUEUE, 3.0, None, ())
    assert not live.early  # another attempt makes its own
    assert (live.decodes, live.needs("m"), live.computes_on("m")) == (False, False, False)


def test_only_waiting_between_attempts_is_held_against_the_queue_s_deadline() -> None:
    live = local_stream()
    assert live.queued == 0.0
    live.stop(4.0)
    live.begin(LOCAL, 3, 6.5)
    assert live.queued == 2.5
    live.stop(7.0)
    live.begin(LOCAL, 3, 8.0)
    assert live.queued == 3.5
    live.append(7, 9.0)
    assert live.queued == 0.0  # it gets on


def test_the_client_is_told_of_the_first_attempt() -> None:
    live, other = split_stream(), local_stream()
    assert (live.timeline.dispatched, live.timeline.split, other.timeline.split) == (1.0, True, False)
    live.stop(2.0)
    live.begin(LOCAL, 3, 3.0)
    assert (live.timeline.dispatched, live.timeline.split) == (1.0, True)


def test_an_attempt_that_has_got_on_clears_its_request() -> None:
    live = local_stream()
    live.retries, live.crashes = 2, 2
    for index in range(PROGRESS_TOKENS):
        assert (live.retries, live.crashes) == (2, 2)
        live.append(index, 2.0)
    assert (live.retries, live.crashes) == (0, 0)
