"""The official client, unmodified, against a server of real processes and a real (if small) model."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from server import Server, is_idle, serving, soon

from checkpoints import make_checkpoint

KEY = "sk-of-the-tests"
MESSAGES = [{"role": "user", "content": "Say something about herons, at some length."}]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    checkpoint = make_checkpoint("llama3", tmp_path_factory.mktemp("checkpoints"))
    flags = ("--served-model-name", "tiny", "--api-key", KEY, "--max-model-len", "1024")
    with serving(str(checkpoint), *flags) as server:
        yield server
        soon(lambda: is_idle(server), "all blocks are given back")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "diptych"


@pytest.mark.parametrize("prefer", ["split", "local"])
def test_a_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI, prefer: str) -> None:
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "seed": 5, "temperature": 0.8}
    headers = {"x-diptych-prefer": prefer}
    whole = client.chat.completions.create(**options, extra_headers=headers)
    with client.chat.completions.create(
        **options, extra_headers=headers, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    [choice] = whole.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > len(MESSAGES[0]["content"])


@pytest.mark.parametrize("prefer", ["split", "local"])
def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI, prefer: str) -> None:
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    headers = {"x-diptych-prefer": prefer}
    whole = client.completions.create(**options, extra_headers=headers)
    with client.completions.create(**options, extra_headers=headers, stream=True) as stream:
        text = "".join(chunk.choices[0].text for chunk in stream)
    assert text == whole.choices[0].text != ""
    assert whole.usage.prompt_tokens == len(PROMPT)


def test_n_choices_differ_and_are_the_same_again_with_the_same_seed(client: openai.OpenAI) -> None:
    def texts() -> list[str | None]:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, n=2, seed=3, max_tokens=16)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage.completion_tokens == 32
        return [choice.message.content for choice in answer.choices]

    first = texts()
    assert first[0] != first[1]
    assert texts() == first


def test_n_choices_streamed(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "prompt": PROMPT, "n": 2, "seed": 3, "max_tokens": 16}
    whole = client.completions.create(**options)
    texts = {0: "", 1: ""}
    with client.completions.create(**options, stream=True) as stream:
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {choice.index: choice.text for choice in whole.choices}


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    for entry in content:
        best = entry.top_logprobs[0]
        assert (entry.token, entry.logprob) == (best.token, best.logprob)
        assert 0 >= best.logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 8
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values())


def test_stop_string(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    stop = text[len(text) // 2 :][:2]
    stopped = client.completions.create(**options, stop=stop).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")
    with client.completions.create(**options, stop=[stop], stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == stopped.text


def test_errors_are_of_the_class_that_the_client_has_for_them(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=-1)
    assert refused.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="tiny", prompt="a" * 1020, max_tokens=5)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="large", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-other", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_leaving_a_stream_ends_the_request(client: openai.OpenAI, server: Server) -> None:
    with client.completions.create(model="tiny", prompt=PROMPT, max_tokens=900, stream=True) as stream:
        next(iter(stream))
    soon(lambda: is_idle(server), "its blocks are given back")
