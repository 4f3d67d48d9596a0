"""Bad input gets its own status, `param` and a message, and reaches nobody. Rows are those of the fault list."""

from __future__ import annotations

from typing import Any

import pytest
from front_fakes import FakeDispatcher, ask

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HUGE = 10**18


def completion(**fields: Any) -> tuple[str, Any]:
    return COMPLETIONS, {"model": "tiny", "prompt": "cat"} | fields


def chat(*messages: Any, **fields: Any) -> tuple[str, Any]:
    return CHAT, {"model": "tiny", "messages": list(messages) or [{"role": "user", "content": "cat"}]} | fields


def tool_call() -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call_1", "content": "42"}


ROWS: list[tuple[int, tuple[str, Any], str | None]] = [
    (1, (COMPLETIONS, b'{"model": "tiny", "prompt"'), None),
    (1, (CHAT, b"{'model': 'tiny'}"), None),
    (3, (COMPLETIONS, b'{"model": "tiny", "prompt": "\xff"}'), None),
    (3, (COMPLETIONS, b'{"model": "tiny", "prompt": "a\\ud800"}'), "prompt"),
    (3, completion(prompt="a\0b"), "prompt"),
    (3, completion(prompt=["a", "\0"]), "prompt"),
    (3, completion(stop=["\ud800"]), "stop"),
    (3, chat({"role": "user", "content": "a\0"}), "messages[0].content"),
    (3, chat({"role": "user", "content": [{"type": "text", "text": "\ud800"}]}), "messages[0].content"),
    (3, chat({"role": "user", "content": "a", "name": "\0"}), "messages[0].name"),
    (3, chat(chat_template_kwargs={"preamble": "\ud800"}), "messages"),
    (4, (COMPLETIONS, b'{"prompt":[' + b"[]," * 200_000 + b"[]]}"), None),
    (4, (COMPLETIONS, b"[" * 100_000), None),
    (4, (COMPLETIONS, b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), None),
    (4, completion(**{f"x{i}": 1 for i in range(1000)}), None),
    (4, (COMPLETIONS, b'{"model": "tiny", "prompt": "a", "prompt": "b"}'), "prompt"),
    (4, (COMPLETIONS, b'{"model": "tiny", "prompt": "a", "temperature": 1e400}'), None),
    (4, (COMPLETIONS, b'{"model": "tiny", "prompt": "a", "temperature": NaN}'), None),
    (4, completion(temperature=10**400), "temperature"),
    *[(5, completion(max_tokens=value), "max_tokens") for value in (-1, 0, 1.5, "7", True, HUGE)],
    *[(5, chat(max_completion_tokens=value), "max_completion_tokens") for value in (0, HUGE)],
    (6, completion(n=10**9), "n"),
    (6, completion(n=0), "n"),
    (6, completion(prompt=["a"] * 200), "prompt"),
    (6, completion(n=4, best_of=2), "best_of"),
    (6, completion(n=2, temperature=0), "n"),
    (6, chat(n=2, temperature=0), "n"),
    *[(7, completion(temperature=value), "temperature") for value in (-0.1, 2.1, "1")],
    *[(7, completion(top_p=value), "top_p") for value in (0, 1.1, -1)],
    *[(7, completion(top_k=value), "top_k") for value in (-2, 1.5)],
    *[(7, completion(min_p=value), "min_p") for value in (-0.1, 1.1)],
    *[(7, completion(frequency_penalty=value), "frequency_penalty") for value in (-2.1, 2.1)],
    *[(7, completion(presence_penalty=value), "presence_penalty") for value in (-2.1, 2.1)],
    *[(7, completion(repetition_penalty=value), "repetition_penalty") for value in (0, -1, 1e9)],
    *[(7, completion(seed=value), "seed") for value in (1.5, 2**70, "1")],
    (7, completion(min_tokens=5, max_tokens=4), "min_tokens"),
    (7, completion(min_tokens=-1), "min_tokens"),
    (7, completion(min_tokens=HUGE), "min_tokens"),
    (8, completion(prompt=[1] * 256), "prompt"),
    (8, completion(prompt=[1] * 250, max_tokens=7), "prompt"),
    (8, completion(prompt=[1] * 250, min_tokens=7), "prompt"),
    (8, chat({"role": "user", "content": "cat " * 256}), "messages"),
    (9, completion(prompt=""), "prompt"),
    (9, completion(prompt=[]), "prompt"),
    (9, completion(prompt=[[]]), "prompt"),
    (9, completion(prompt=["a", ""]), "prompt"),
    (9, (COMPLETIONS, {"model": "tiny"}), "prompt"),
    (9, (COMPLETIONS, {"prompt": "a"}), "model"),
    (9, (CHAT, {"model": "tiny"}), "messages"),
    (9, (CHAT, {"model": "tiny", "messages": []}), "messages"),
    (9, chat({"role": "user"}), "messages[0].content"),
    (9, chat({"content": "a"}), "messages[0].role"),
    (9, chat({"role": "wizard", "content": "a"}), "messages[0].role"),
    (9, chat({"role": "user", "content": "a"}, tool_call()), "messages[1].role"),
    (9, chat("hello"), "messages[0]"),
    (10, completion(prompt="a" * 1_000_000), "prompt"),
    (10, chat({"role": "user", "content": "a" * 1_000_000}), "messages"),
    *[(11, completion(prompt=[1, value]), "prompt") for value in (-1, 512, 2**63, 10**300)],
    (11, completion(prompt=[1, 2.5]), "prompt[1]"),
    (11, completion(prompt=[1, "a"]), "prompt"),
    (11, completion(prompt=[[1], [True]]), "prompt[1][0]"),
    (11, completion(stop_token_ids=[512]), "stop_token_ids"),
    (12, completion(stop=["x"] * 100_000), "stop"),
    (12, completion(stop=[""]), "stop[0]"),
    (12, completion(stop=""), "stop"),
    (12, completion(stop="x" * 10_000), "stop"),
    (12, completion(stop=[1]), "stop[0]"),
    (13, completion(logit_bias={"512": 1}), "logit_bias"),
    (13, completion(logit_bias={"-1": 1}), "logit_bias"),
    (13, completion(logit_bias={"cat": 1}), "logit_bias"),
    (13, completion(logit_bias={"\u0663": 1}), "logit_bias"),
    (13, completion(logit_bias={"1": 1e308}), "logit_bias[...]"),
    (13, completion(logit_bias={str(i): 1 for i in range(100_000)}), "logit_bias"),
    (0, completion(logprobs=21), "logprobs"),
    (0, completion(logprobs=1, echo=True), "logprobs"),
    (0, completion(suffix="x"), "suffix"),
    (0, completion(stream_options={"include_usage": True}), "stream_options"),
    (0, chat(top_logprobs=2), "top_logprobs"),
    (0, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (0, chat(logprobs=3), "logprobs"),
    (0, chat(tools=[{"type": "function"}]), "tools"),
    (0, chat(response_format={"type": "json_object"}), "response_format"),
    (0, chat(modalities=["text", "audio"]), "modalities"),
    (0, chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}), "messages[0].content[0].type"),
    (0, chat({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0].text"),
    (0, chat(chat_template_kwargs={"messages": "x"}), "chat_template_kwargs"),
]


@pytest.mark.fault(1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)
@pytest.mark.parametrize(("row", "sent", "param"), ROWS, ids=[f"row{row}-{i}" for i, (row, _, _) in enumerate(ROWS)])
def test_refused(row: int, sent: tuple[str, Any], param: str | None) -> None:
    dispatcher = FakeDispatcher()
    response = ask(dispatcher, *sent)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert 0 < len(error["message"]) < 300
    assert response.headers["x-request-id"]
    assert dispatcher.streams == []
    if row == 1:
        assert error["code"] == "invalid_json"
        assert "char" in error["message"]
    if row in (8, 10):
        assert error["code"] == "context_length_exceeded"
        assert "256" in error["message"]
    if row == 10:
        assert "characters" in error["message"]  # refused before a tokenizer saw it


@pytest.mark.fault(8)
@pytest.mark.parametrize(
    ("body", "max_tokens"),
    [
        ({"prompt": [1] * 250, "max_tokens": 6}, 6),
        ({"prompt": [1] * 255, "max_tokens": 1}, 1),
        ({"prompt": [1] * 250}, 6),
        ({"prompt": [1] * 100}, 16),
        ({"prompt": [1] * 100, "min_tokens": 20}, 20),
        ({"prompt": [1], "max_tokens": None, "temperature": None, "n": None, "stop": None}, 16),
        ({"prompt": [511], "temperature": 0, "n": 1, "best_of": 1, "top_k": -1}, 16),
        ({"prompt": [1], "suffix": "", "logit_bias": {}, "use_beam_search": False}, 16),
    ],
)
def test_accepted_to_the_last_token(body: dict[str, Any], max_tokens: int) -> None:
    dispatcher = FakeDispatcher()
    assert ask(dispatcher, COMPLETIONS, {"model": "tiny"} | body).status_code == 200
    assert dispatcher.streams[0].request.sampling.max_tokens == max_tokens


def test_chat_may_use_the_whole_context() -> None:
    dispatcher = FakeDispatcher()
    assert ask(dispatcher, *chat()).status_code == 200
    request = dispatcher.streams[0].request
    assert len(request.prompt_token_ids) + request.sampling.max_tokens == 256


def test_sampling_fields_arrive_where_they_belong() -> None:
    dispatcher = FakeDispatcher()
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "frequency_penalty": 0.2,
        "presence_penalty": -0.3,
        "repetition_penalty": 1.1,
        "seed": -1,
        "min_tokens": 2,
        "max_tokens": 3,
        "ignore_eos": True,
    }
    ask(dispatcher, *completion(**fields, logit_bias={"5": -100}, stop_token_ids=[9, 9], logprobs=4))
    sampling = dispatcher.streams[0].request.sampling
    assert {name: getattr(sampling, name) for name in fields} == fields | {"seed": 2**64 - 1}
    assert sampling.logit_bias == ((5, -100.0),)
    assert sampling.stop_token_ids == (9,)
    assert sampling.logprobs == 4


@pytest.mark.fault(16, 65)
@pytest.mark.parametrize("model", ["other", "Tiny", "../../etc/passwd", "", "x" * 10_000, "a\nb"])
def test_unknown_model(model: str) -> None:
    for path, body in (completion(model=model), chat(model=model), ("/tokenize", {"model": model, "prompt": "a"})):
        response = ask(FakeDispatcher(), path, body, served_model_names=("tiny", "alias"))
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "tiny, alias" in error["message"]
        assert "\n" not in error["message"]
        assert len(error["message"]) < 200


@pytest.mark.fault(17, 27, 65)
def test_unknown_fields_are_ignored_and_named() -> None:
    response = ask(FakeDispatcher(), *completion(guided_json={}, kv_transfer_params={"host": "x"}, **{"a\r\nb": 1}))
    assert response.status_code == 200
    assert response.headers["x-diptych-ignored"] == "a\\r\\nb, guided_json, kv_transfer_params"
    assert "guided_json is ignored" in response.json()["warnings"]


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("HEAD", COMPLETIONS, 405, "method_not_allowed"),
        ("OPTIONS", CHAT, 405, "method_not_allowed"),
        ("POST", "/fleet", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", 404, "path_not_found"),
        ("POST", "/v1/completions/", 404, "path_not_found"),
        ("GET", "/v1/models/../../etc/passwd", 404, "path_not_found"),
        ("GET", "/v1/models/%2e%2e%2fetc", 404, "model_not_found"),
    ],
)
def test_wrong_method_or_path(method: str, path: str, status: int, code: str) -> None:
    response = ask(FakeDispatcher(), path, method=method)
    assert response.status_code == status
    if method != "HEAD":
        assert response.json()["error"]["code"] == code
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.fault(18)
@pytest.mark.parametrize("content_type", ["text/plain", "", "application/x-www-form-urlencoded", "application/jsonx"])
def test_wrong_content_type(content_type: str) -> None:
    response = ask(FakeDispatcher(), *completion(), headers={"content-type": content_type})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_content_type_with_parameters() -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert ask(FakeDispatcher(), *completion(), headers=headers).status_code == 200


@pytest.mark.fault(2)
def test_body_over_the_limit() -> None:
    response = ask(FakeDispatcher(), *completion(prompt="a" * 2000), max_body_bytes=1000)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert response.headers["connection"] == "close"


def test_preference_header() -> None:
    dispatcher = FakeDispatcher()
    for value in ("split", "local"):
        assert ask(dispatcher, *completion(), headers={"x-diptych-prefer": value}).status_code == 200
        assert dispatcher.streams[-1].request.prefer == value
    refused = ask(dispatcher, *completion(), headers={"x-diptych-prefer": "both"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-diptych-prefer")


def test_checkpoint_header() -> None:
    dispatcher = FakeDispatcher()
    for value in ("0", "16", "4096"):
        assert ask(dispatcher, *completion(), headers={"x-diptych-checkpoint": value}).status_code == 200
        assert dispatcher.streams[-1].request.checkpoint_tokens == int(value)
    for value in ("1", "-16", "16.0", "\u0664\u0662", "9" * 11):
        refused = ask(dispatcher, *completion(), headers={"x-diptych-checkpoint": value.encode()})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-diptych-checkpoint")


def test_race_header() -> None:
    dispatcher = FakeDispatcher()
    for headers, race in (({"x-diptych-race": "3"}, 3), ({"x-diptych-race": "1"}, 1), ({}, 2)):
        assert ask(dispatcher, *completion(), headers=headers, race=2).status_code == 200
        assert dispatcher.streams[-1].request.race == race
    for value in ("0", "5", "two"):
        refused = ask(dispatcher, *completion(), headers={"x-diptych-race": value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-diptych-race")


def test_what_the_deployment_says_about_checkpoints_holds_unless_a_request_says_otherwise() -> None:
    dispatcher = FakeDispatcher()
    for headers, tokens in (({}, 64), ({"x-diptych-checkpoint": "0"}, 0)):
        assert ask(dispatcher, *completion(), headers=headers, checkpoint_tokens=64).status_code == 200
        assert dispatcher.streams[-1].request.checkpoint_tokens == tokens


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": []}, "prompt"),
        ({"prompt": "\0"}, "prompt"),
        ({"messages": []}, "messages"),
    ],
)
def test_tokenize_refuses(body: dict[str, Any], param: str) -> None:
    response = ask(FakeDispatcher(), "/tokenize", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.fault(11)
@pytest.mark.parametrize("tokens", [[512], [-1], [2**63]])
def test_detokenize_refuses(tokens: list[int]) -> None:
    response = ask(FakeDispatcher(), "/detokenize", {"tokens": tokens})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tokens")


SCHEMAS: list[Any] = [
    {"$ref": "#"},
    {"type": "string", "pattern": "(a+)+$"},
    {"enum": ["x" * 100] * 10_000},
    {"allOf": [{"allOf": [{}]}]},
]


@pytest.mark.fault(14, 15)
@pytest.mark.parametrize("schema", SCHEMAS, ids=["recursive", "exponential", "huge", "nested"])
def test_structured_output_is_not_offered_whatever_the_schema(schema: Any) -> None:
    dispatcher = FakeDispatcher()
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = ask(dispatcher, *chat(response_format=wanted))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert dispatcher.streams == []


def test_copies_are_refused_where_nobody_could_keep_them() -> None:
    """And not promised in silence."""
    dispatcher = FakeDispatcher()
    headers = {"x-diptych-checkpoint": "64"}
    refused = ask(dispatcher, *completion(), headers=headers, copies=False)
    error = refused.json()["error"]
    assert (refused.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == ("x-diptych-checkpoint", "unsupported_parameter")
    assert dispatcher.streams == []
    assert ask(dispatcher, *completion(), headers={"x-diptych-checkpoint": "0"}, copies=False).status_code == 200
