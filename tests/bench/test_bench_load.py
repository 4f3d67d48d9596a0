import asyncio

import pytest
from bench_fakes import DONE_EVENT, ERROR_EVENT, FakeServer, event
from hypothesis import given
from hypothesis import strategies as st

from diptych.bench.load import (
    Exchange,
    LoadClient,
    clock,
    completion_request,
    outcome_of,
    parse_server_timing,
    read_stream,
)
from diptych.bench.server import free_port
from diptych.front.server import bind, serve


def offer(fake, num_requests=3, num_tokens=6, arrivals=None):
    """The outcomes of requests sent to a fake server."""

    async def run():
        async with serve(fake.app(), bind("127.0.0.1", 0)) as server, LoadClient(server.url) as client:
            requests = [completion_request("fake", [1, 2, 3], num_tokens) for _ in range(num_requests)]
            exchanges = await client.offer(requests, arrivals or [0.0] * num_requests)
            return [outcome_of(exchange) for exchange in exchanges]

    return asyncio.run(run())


def test_whole_answers():
    fake = FakeServer(gap=0.001)
    outcomes = offer(fake)
    assert [outcome.failure for outcome in outcomes] == [None] * 3
    for outcome in outcomes:
        times = outcome.timeline.token_times
        assert len(times) == 6
        assert times == sorted(times)
        assert outcome.timeline.arrived < times[0] <= times[-1] <= outcome.timeline.finished
        assert outcome.route == "split"
        assert outcome.server_timing == {"queue": 1.5}
        assert outcome.num_prompt_tokens == 3


def test_a_request_is_greedy_and_is_not_ended_early():
    fake = FakeServer()
    offer(fake, num_requests=1, num_tokens=5)
    assert fake.bodies == [
        {
            "model": "fake",
            "prompt": [1, 2, 3],
            "max_tokens": 5,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
    ]


def test_tokens_of_one_chunk_share_its_time():
    [outcome] = offer(FakeServer(tokens_per_chunk=3), num_requests=1)
    times = outcome.timeline.token_times
    assert times[0] == times[1] == times[2]
    assert times[3] == times[4] == times[5]
    assert outcome.timeline.itl.count(0.0) >= 4


def test_requests_leave_when_due_while_earlier_ones_run():
    fake = FakeServer(gap=0.05)
    arrivals = [0.0, 0.01, 0.02, 0.03]
    outcomes = offer(fake, num_requests=4, num_tokens=4, arrivals=arrivals)
    due = [outcome.timeline.arrived - outcomes[0].timeline.arrived for outcome in outcomes]
    assert due == pytest.approx(arrivals)
    assert outcomes[-1].timeline.arrived < outcomes[0].timeline.finished


@pytest.mark.parametrize(
    ("fake", "failure"),
    [
        (FakeServer(refuse=429), "HTTP 429 queue_full"),
        (FakeServer(fail_after=2), "stream: worker_lost"),
        (FakeServer(end_event=b"the end\n\n"), "stream: malformed event"),
        (FakeServer(end_event=b""), "stream: truncated"),
        (FakeServer(withhold=2), "tokens: 2 missing"),
    ],
)
def test_every_way_to_fail_has_a_name(fake, failure):
    assert [outcome.failure for outcome in offer(fake)] == [failure] * 3


def test_a_sign_of_life_is_no_event():
    assert read_stream([(1.0, b": keep-alive\n\n")]).error is None


def test_nobody_listens():
    async def run():
        async with LoadClient(f"http://127.0.0.1:{free_port()}") as client:
            return await client.send_all([completion_request("fake", [1], 1)])

    [exchange] = asyncio.run(run())
    assert outcome_of(exchange).failure == "connection: ClientConnectorError"


def stream_until(fake, requests, num_ended):
    """The exchanges of streams that are kept running until the server has ended so many."""

    async def run():
        async with serve(fake.app(), bind("127.0.0.1", 0)) as server, LoadClient(server.url) as client:
            async with client.streaming(requests) as exchanges:
                for _ in range(num_ended):
                    await fake.ended.acquire()
            return exchanges

    return asyncio.run(run())


def test_streams_are_kept_running_and_then_cut_off():
    exchanges = stream_until(FakeServer(gap=0.002), [completion_request("fake", [1], 3)] * 2, num_ended=6)
    cut_off = [exchange for exchange in exchanges if exchange.finished is None]
    assert len(exchanges) >= 6
    assert 1 <= len(cut_off) <= 2
    assert [outcome_of(exchange).failure for exchange in exchanges] == [None] * len(exchanges)


def test_a_stream_that_fails_is_not_begun_again():
    sound, failing = completion_request("fake", [1], 1), completion_request("fake", [1], 3)
    exchanges = stream_until(FakeServer(fail_after=1), [sound, failing], num_ended=6)
    assert [exchange.request for exchange in exchanges].count(failing) == 1
    assert [exchange.request for exchange in exchanges].count(sound) >= 4


def test_a_late_client_makes_latency_longer():
    request = completion_request("fake", [1], 1)
    exchange = Exchange(request, due=10.0, sent=10.5, pieces=[(11.0, event([7]) + DONE_EVENT)], finished=11.1)
    outcome = outcome_of(exchange)
    assert outcome.lag == 0.5
    assert outcome.timeline.ttft == 1.0


@given(
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    cuts=st.sets(st.integers(1, 300), max_size=10),
)
def test_parsing_does_not_depend_on_how_the_bytes_were_cut(chunks, cuts):
    body = b"".join(event(range(size)) for size in chunks) + DONE_EVENT
    edges = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    pieces = [(float(end), body[start:end]) for start, end in zip(edges, edges[1:], strict=False)]
    content = read_stream(pieces)
    assert content.done
    assert content.error is None
    assert len(content.token_times) == sum(chunks)
    position, expected = 0, []
    for size in chunks:
        position += len(event(range(size)))
        expected += [min(float(edge) for edge in edges if edge >= position)] * size
    assert content.token_times == expected


def test_tokens_before_an_error_count_and_the_error_stays():
    content = read_stream([(1.0, event([1, 2])), (2.0, ERROR_EVENT)])
    assert (len(content.token_times), content.error, content.done) == (2, "worker_lost", False)


@pytest.mark.parametrize("junk", [b"data: {", b"data: []\n\n", b"data: 1\n\n", b'data: {"choices": 3}\n\n', b"x\n\n"])
def test_junk_is_an_error_and_not_an_exception(junk):
    assert read_stream([(clock(), junk)]).error == "malformed event"


def test_server_timing():
    assert parse_server_timing("queue;dur=1.5, prefill;dur=240") == {"queue": 1.5, "prefill": 240.0}
    assert parse_server_timing("") == {}
