"""The official client, unmodified, over a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import openai
import pytest
from front_fakes import FakeDispatcher, byte_level_tokenizer, running_front, says

from diptych.core.errors import ContextLengthError, DiptychError, OverloadedError, ServingError, UnavailableError

Result = TypeVar("Result")
USER = [{"role": "user", "content": "hello"}]
TEXT = "the cat sat 你好 😀"


def with_client(
    dispatcher: FakeDispatcher, use: Callable[[openai.AsyncOpenAI], Awaitable[Result]], **settings: object
) -> Result:
    async def run() -> Result:
        async with (
            running_front(dispatcher, **settings) as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client,
        ):
            return await use(client)

    return asyncio.run(run())


def test_chat() -> None:
    answer = with_client(
        FakeDispatcher(says(TEXT), num_cached_tokens=2),
        lambda client: client.chat.completions.create(model="tiny", messages=USER, seed=1),
    )
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    prompt = byte_level_tokenizer().encode("<|user|>hello<|end|>")
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(byte_level_tokenizer().encode(TEXT)) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_chat_stream() -> None:
    async def use(client: openai.AsyncOpenAI) -> list:
        options = {"include_usage": True}
        stream = await client.chat.completions.create(model="tiny", messages=USER, stream=True, stream_options=options)
        return [chunk async for chunk in stream]

    chunks = with_client(FakeDispatcher(says(TEXT)), use)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(byte_level_tokenizer().encode(TEXT)) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_logprobs() -> None:
    answer = with_client(
        FakeDispatcher(says("你")),
        lambda client: client.chat.completions.create(model="tiny", messages=USER, logprobs=True, top_logprobs=2),
    )
    content = answer.choices[0].logprobs.content
    assert bytes(byte for entry in content[:-1] for byte in entry.bytes).decode() == "你"
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.logprob == -0.5 for entry in content)
    assert content[-1].token == "<|end|>"


def test_completion_of_several_prompts_and_choices() -> None:
    async def use(client: openai.AsyncOpenAI) -> openai.types.Completion:
        return await client.completions.create(model="tiny", prompt=["cat", "the mat"], n=2, max_tokens=4, seed=5)

    dispatcher = FakeDispatcher()
    answer = with_client(dispatcher, use)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.finish_reason == "length" for choice in answer.choices)
    requests = [stream.request for stream in dispatcher.streams]
    assert requests[0].prompt_token_ids == requests[1].prompt_token_ids != requests[2].prompt_token_ids
    assert requests[0].sampling.seed == requests[2].sampling.seed == 5
    assert requests[1].sampling.seed == requests[3].sampling.seed != 5
    assert [request.request_id for request in requests] == [f"{answer.id}.{i}" for i in range(4)]
    assert answer.usage.prompt_tokens == len(requests[0].prompt_token_ids) + len(requests[2].prompt_token_ids)
    assert answer.usage.completion_tokens == 16


def test_completion_echo_and_logprobs() -> None:
    async def use(client: openai.AsyncOpenAI) -> tuple[openai.types.Completion, openai.types.Completion]:
        echo = await client.completions.create(model="tiny", prompt="cat", echo=True, max_tokens=1)
        return echo, await client.completions.create(model="tiny", prompt="the cat", logprobs=1, max_tokens=9)

    echo, scored = with_client(FakeDispatcher(says("mat sat")), use)
    assert echo.choices[0].text.startswith("cat")
    assert len(echo.choices[0].text) > 3
    logprobs = scored.choices[0].logprobs
    text = scored.choices[0].text
    for token, offset in zip(logprobs.tokens[:-1], logprobs.text_offset, strict=False):
        assert text[offset:].startswith(token)
    assert all(token in tops for token, tops in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))


def test_stream_of_two_choices() -> None:
    async def use(client: openai.AsyncOpenAI) -> list[str]:
        texts = ["", ""]
        stream = await client.completions.create(model="tiny", prompt="cat", n=2, max_tokens=9, stream=True)
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        return texts

    assert with_client(FakeDispatcher(says("hello world")), use) == ["hello world"] * 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "shown"), [("t s", "the ca"), ("好", "the cat sat 你"), ("\U0001f600", "the cat sat 你好 ")]
)
def test_stop_string_ends_the_request_below(stream: bool, stop: str, shown: str) -> None:
    async def use(client: openai.AsyncOpenAI) -> str:
        answer = await client.completions.create(
            model="tiny", prompt="x", stop=[stop, "never"], max_tokens=100, stream=stream
        )
        if not stream:
            assert answer.choices[0].finish_reason == "stop"
            return answer.choices[0].text
        return "".join([chunk.choices[0].text async for chunk in answer])

    dispatcher = FakeDispatcher(says(TEXT + " on the mat"))
    assert with_client(dispatcher, use) == shown
    assert dispatcher.streams[0].cancelled.is_set()


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OverloadedError("full", retry_after=2.0), openai.RateLimitError),
        (UnavailableError("nobody", retry_after=0.2), openai.InternalServerError),
        (ContextLengthError("too long"), openai.BadRequestError),
        (ServingError("worker lost"), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_errors_before_the_first_token_keep_their_status(
    failure: DiptychError, expected: type[openai.APIStatusError], stream: bool, early: bool
) -> None:
    dispatcher = FakeDispatcher(refusal=failure) if early else FakeDispatcher(failures={0: failure})
    with pytest.raises(expected) as caught:
        with_client(dispatcher, lambda client: client.completions.create(model="tiny", prompt="x", stream=stream))
    assert caught.value.status_code == failure.status
    assert caught.value.code == failure.code
    if isinstance(failure, OverloadedError):
        assert int(caught.value.response.headers["retry-after"]) >= failure.retry_after
        assert int(caught.value.response.headers["retry-after-ms"]) == round(failure.retry_after * 1000)


def test_failure_in_mid_stream_is_raised_by_the_client() -> None:
    async def use(client: openai.AsyncOpenAI) -> str:
        text = ""
        stream = await client.completions.create(model="tiny", prompt="x", max_tokens=9, stream=True)
        try:
            async for chunk in stream:
                text += chunk.choices[0].text
        except openai.APIError as error:
            return f"{text} and then {error.message}"
        return text

    dispatcher = FakeDispatcher(says("hello world"), failures={2: ServingError("worker lost")})
    text, _, message = with_client(dispatcher, use).partition(" and then ")
    assert message == "worker lost"
    assert text
    assert "hello world".startswith(text)


def test_other_errors_have_their_classes() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model="tiny", prompt="x", max_tokens=-1)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).id == "tiny"

    with_client(FakeDispatcher(), use, api_keys=("key",))
