"""What is on the wire while an answer grows, and what happens when somebody leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from front_fakes import FakeDispatcher, FakeStream, ask, byte_level_tokenizer, events_of, running_front, says, until

from diptych.core.errors import OverloadedError, ServingError
from diptych.front.tokenizer import ByteTokenizer

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
COMPLETION = {"model": "tiny", "prompt": "abc", "max_tokens": 4}


def stream_events(dispatcher: FakeDispatcher, path: str, body: dict[str, Any]) -> list[Any]:
    response = ask(dispatcher, path, body | {"stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events_of(response.text)


def test_chat_events_in_order() -> None:
    dispatcher = FakeDispatcher(says("the cat"))
    *events, done = stream_events(dispatcher, "/v1/chat/completions", CHAT | {"max_tokens": 9})
    assert done == "[DONE]"
    assert events[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert all(set(event["choices"][0]["delta"]) == {"content"} for event in events[1:-1])
    assert events[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert all("usage" not in event for event in events)


def test_usage_events() -> None:
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    *events, last, done = stream_events(FakeDispatcher(num_cached_tokens=3), "/v1/completions", COMPLETION | options)
    assert done == "[DONE]"
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4]
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_failure_ends_the_stream_without_done() -> None:
    dispatcher = FakeDispatcher(failures={2: ServingError("lost", code="worker_lost")})
    events = stream_events(dispatcher, "/v1/completions", COMPLETION)
    assert events[-1]["error"] == {"message": "lost", "type": "server_error", "param": None, "code": "worker_lost"}
    assert "[DONE]" not in events
    assert dispatcher.streams[0].cancelled.is_set()


def test_one_choice_fails_and_all_are_stopped() -> None:
    dispatcher = FakeDispatcher(failures={2: ServingError("lost")})
    events = stream_events(dispatcher, "/v1/completions", COMPLETION | {"n": 3})
    assert "error" in events[-1]
    assert all(stream.cancelled.is_set() for stream in dispatcher.streams)


def test_refusal_of_a_later_choice_takes_back_the_earlier() -> None:
    dispatcher = FakeDispatcher(refusal=OverloadedError("full", retry_after=1), accept=2)
    assert ask(dispatcher, "/v1/completions", COMPLETION | {"n": 3}).status_code == 429
    assert [stream.cancelled.is_set() for stream in dispatcher.streams] == [True, True]


def test_unexpected_failure_says_nothing_about_the_inside() -> None:
    dispatcher = FakeDispatcher(failures={0: RuntimeError("/secret/path")})  # type: ignore[dict-item]

    async def send() -> httpx.Response:
        async with running_front(dispatcher) as url, httpx.AsyncClient(base_url=url) as client:
            return await client.post("/v1/completions", json=COMPLETION)

    response = asyncio.run(send())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]


def test_unexpected_failure_in_mid_stream() -> None:
    dispatcher = FakeDispatcher(failures={2: RuntimeError("/secret/path")})  # type: ignore[dict-item]
    events = stream_events(dispatcher, "/v1/completions", COMPLETION)
    assert events[-1]["error"]["code"] == "internal_error"
    assert "secret" not in str(events)


def test_headers_of_an_answer() -> None:
    route = "prefill=prefill-0;decode=decode-0;transport=local"
    whole = ask(FakeDispatcher(), "/v1/completions", COMPLETION)
    assert whole.headers["x-diptych-route"] == route
    timing = "queue;dur=1.000, prefill;dur=20.000, handoff;dur=10.000, decode;dur=20.000"
    assert whole.headers["server-timing"] == timing
    two = ask(FakeDispatcher(), "/v1/completions", COMPLETION | {"n": 2, "stream": True})
    assert two.headers["x-diptych-route"] == f"{route}, {route}"
    assert two.headers["server-timing"].startswith("queue;dur=1.000, prefill;dur=20.000")


@pytest.mark.fault(26, 65)
def test_request_ids_are_echoed_but_not_used() -> None:
    dispatcher = FakeDispatcher()
    answers = [
        ask(dispatcher, "/v1/completions", COMPLETION, headers={"x-request-id": "same\t<id>\x1b[31m"}) for _ in range(2)
    ]
    assert [answer.headers["x-request-id"] for answer in answers] == ["sameid31m"] * 2
    assert answers[0].json()["id"] != answers[1].json()["id"]
    assert len({stream.request.request_id for stream in dispatcher.streams}) == 2


def test_token_ids_come_back_when_asked_for() -> None:
    body = COMPLETION | {"prompt": [97, 98], "return_token_ids": True}
    whole = ask(FakeDispatcher(), "/v1/completions", body).json()["choices"][0]
    assert (whole["prompt_token_ids"], whole["token_ids"]) == ([97, 98], [97, 98, 97, 98])
    *events, _ = stream_events(FakeDispatcher(), "/v1/completions", body)
    assert events[0]["choices"][0]["prompt_token_ids"] == [97, 98]
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == [97, 98, 97, 98]
    *events, _ = stream_events(FakeDispatcher(), "/v1/chat/completions", CHAT | {"return_token_ids": True})
    assert events[0]["prompt_token_ids"]
    assert sum(len(event["choices"][0]["token_ids"]) for event in events) == 4


def test_random_seeds_differ_and_given_ones_do_not() -> None:
    dispatcher = FakeDispatcher()
    for seed in (None, None, 7, 7):
        ask(dispatcher, "/v1/completions", COMPLETION | {"seed": seed})
    seeds = [stream.request.sampling.seed for stream in dispatcher.streams]
    assert seeds[0] != seeds[1]
    assert seeds[2:] == [7, 7]


def test_stop_strings_wait_for_min_tokens() -> None:
    body = COMPLETION | {"prompt": [1], "stop": "a", "max_tokens": 8, "min_tokens": 3}
    dispatcher = FakeDispatcher(lambda request: list(b"abcdabcd"))
    answer = asyncio.run(whole_with_bytes(dispatcher, body))
    assert answer["choices"][0]["text"] == "abcd"
    kept = asyncio.run(whole_with_bytes(dispatcher, body | {"include_stop_str_in_output": True}))
    assert kept["choices"][0]["text"] == "abcda"


async def whole_with_bytes(dispatcher: FakeDispatcher, body: dict[str, Any]) -> Any:
    async with running_front(dispatcher, ByteTokenizer()) as url, httpx.AsyncClient(base_url=url) as client:
        return (await client.post("/v1/completions", json=body)).json()


def test_choice_that_met_its_stop_string_is_stopped_while_others_run() -> None:
    async def run() -> list[str]:
        gate = asyncio.Event()
        dispatcher = FakeDispatcher(
            lambda r: b"ab!cdefg" if r.request_id.endswith(".0") else b"abcdefgh", gates={5: gate}
        )
        async with running_front(dispatcher, ByteTokenizer()) as url, httpx.AsyncClient(base_url=url) as client:
            body = COMPLETION | {"n": 2, "stop": "!", "max_tokens": 8}
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            await dispatcher.submitted.wait()
            async with asyncio.timeout(10):
                await dispatcher.streams[0].cancelled.wait()
            assert not dispatcher.streams[1].cancelled.is_set()
            gate.set()
            return [choice["text"] for choice in (await asking).json()["choices"]]

    assert asyncio.run(run()) == ["ab", "abcdefgh"]


def test_stop_token_has_no_text() -> None:
    body = COMPLETION | {"prompt": [1], "stop_token_ids": [99]}
    answer = asyncio.run(whole_with_bytes(FakeDispatcher(lambda request: list(b"abcd")), body))
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("ab", 3)


def test_tokens_arrive_one_by_one() -> None:
    """Each event is there before the next token exists."""

    async def run() -> list[str]:
        gates = {index: asyncio.Event() for index in range(1, 4)}
        texts = []
        async with running_front(FakeDispatcher(gates=gates), ByteTokenizer()) as url:
            client = httpx.AsyncClient(base_url=url)
            async with client, client.stream("POST", "/v1/completions", json=COMPLETION | {"stream": True}) as response:
                lines = response.aiter_lines()
                for index in range(4):
                    if index:
                        gates[index].set()
                    texts.append(await next_data(lines))
        return texts

    texts = asyncio.run(run())
    assert len(texts) == 4


async def next_data(lines: Any) -> str:
    async for line in lines:
        if line.startswith("data: "):
            return str(line)
    raise AssertionError("the stream ended")


@pytest.mark.fault(23)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at", [0, 2])
def test_disconnect_cancels_every_choice(n: int, stream: bool, at: int) -> None:
    """While queued (token 0 does not come) and in the middle of the answer."""

    async def run() -> list[FakeStream]:
        dispatcher = FakeDispatcher(gates={at: asyncio.Event()})
        async with running_front(dispatcher) as url:
            client = httpx.AsyncClient(base_url=url)
            sending = asyncio.create_task(client.post("/v1/completions", json=COMPLETION | {"n": n, "stream": stream}))
            await dispatcher.submitted.wait()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await client.aclose()
            async with asyncio.timeout(10):
                for entry in dispatcher.streams:
                    await entry.cancelled.wait()
            async with httpx.AsyncClient(base_url=url) as other:
                metrics = (await other.get("/metrics")).text
            assert 'diptych_requests_total{outcome="cancelled"} 1.0' in metrics
            assert "diptych_requests_in_flight 0.0" in metrics
        return dispatcher.streams

    assert len(asyncio.run(run())) == n


@pytest.mark.fault(22)
def test_slow_reader_is_cancelled_in_the_end() -> None:
    async def run() -> bool:
        dispatcher = FakeDispatcher(lambda request: [97] * 10**6)
        dispatcher.model = type(dispatcher.model)(
            name="tiny", digest="0", vocab_size=512, max_model_len=2 * 10**6, eos_token_ids=(0,)
        )
        async with running_front(dispatcher, ByteTokenizer(), write_timeout=0.2) as url:
            host, port = url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port), limit=1024)
            body = b'{"model": "tiny", "prompt": "a", "stream": true, "max_tokens": 1000000}'
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
            async with asyncio.timeout(20):
                await dispatcher.submitted.wait()
                await dispatcher.streams[0].cancelled.wait()
            writer.transport.abort()
        return True

    assert asyncio.run(run())


def frames_of(**settings: Any) -> list[bytes]:
    """The first frames of a stream whose first and second token come late."""

    async def run() -> list[bytes]:
        gates = {0: asyncio.Event(), 2: asyncio.Event()}
        dispatcher = FakeDispatcher(gates=gates)
        async with (
            asyncio.timeout(20),
            running_front(dispatcher, **settings) as url,
            httpx.AsyncClient(base_url=url) as client,
            client.stream("POST", "/v1/completions", json=COMPLETION | {"stream": True}) as response,
        ):
            assert response.status_code == 200
            frames: list[bytes] = []
            async for data in response.aiter_raw():
                frames += [frame for frame in data.split(b"\n\n") if frame]
                if frames.count(b": keep-alive") == 2:
                    gates[0].set()
                if frames.count(b": keep-alive") >= 4:
                    gates[2].set()
        return frames

    return asyncio.run(run())


def test_a_stream_that_has_nothing_to_say_says_so() -> None:
    """Before its first token, and later; the answer is no other for it."""
    frames = frames_of(keep_alive_seconds=0.05)
    comments = [frame for frame in frames if frame == b": keep-alive"]
    assert len(comments) >= 4
    assert frames[0] == b": keep-alive"
    events = [frame for frame in frames if frame != b": keep-alive"]
    assert len(events) == 5
    assert events[-1] == b"data: [DONE]"
    between = frames[frames.index(events[1]) : frames.index(events[2])]
    assert b": keep-alive" in between


def test_a_failure_after_a_sign_of_life_is_an_event() -> None:
    async def run() -> str:
        gate = asyncio.Event()
        dispatcher = FakeDispatcher(gates={0: gate}, failures={0: ServingError("gone", code="worker_lost")})
        text = ""
        async with (
            running_front(dispatcher, keep_alive_seconds=0.02) as url,
            httpx.AsyncClient(base_url=url) as client,
            client.stream("POST", "/v1/completions", json=COMPLETION | {"stream": True}) as response,
        ):
            async for piece in response.aiter_text():
                text += piece
                gate.set()
        return text

    text = asyncio.run(run())
    assert text.startswith(": keep-alive\n\n")
    assert '"code":"worker_lost"' in text
    assert "[DONE]" not in text


def test_a_client_that_leaves_before_the_first_sign_of_life_cancels() -> None:
    async def run() -> None:
        dispatcher = FakeDispatcher(gates={0: asyncio.Event()})
        async with running_front(dispatcher, keep_alive_seconds=0.02) as url, httpx.AsyncClient(base_url=url) as client:
            async with client.stream("POST", "/v1/completions", json=COMPLETION | {"stream": True}) as response:
                await anext(response.aiter_raw())
            async with asyncio.timeout(20):
                await dispatcher.streams[0].cancelled.wait()

    asyncio.run(run())


@pytest.mark.fault(26)
def test_one_request_id_twice_at_the_same_time() -> None:
    async def run() -> tuple[FakeDispatcher, list[httpx.Response]]:
        gate = asyncio.Event()
        dispatcher = FakeDispatcher(gates={1: gate})
        async with running_front(dispatcher) as url, httpx.AsyncClient(base_url=url) as client:
            headers = {"x-request-id": "same"}
            bodies = [COMPLETION | {"prompt": prompt} for prompt in ([5, 6], [7, 8])]
            asking = [asyncio.create_task(client.post("/v1/completions", json=b, headers=headers)) for b in bodies]
            await until(lambda: len(dispatcher.streams) == 2)
            gate.set()
            return dispatcher, list(await asyncio.gather(*asking))

    dispatcher, answers = asyncio.run(run())
    assert len({stream.request.request_id for stream in dispatcher.streams}) == 2
    assert len({answer.json()["id"] for answer in answers}) == 2
    assert [answer.headers["x-request-id"] for answer in answers] == ["same", "same"]
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    codec = byte_level_tokenizer()
    assert texts == [codec.decode([5, 6, 5, 6]), codec.decode([7, 8, 7, 8])]
