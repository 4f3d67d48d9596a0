"""What can be asked about the server, and who may ask."""

from __future__ import annotations

from typing import Any

import pytest
from front_fakes import FakeDispatcher, ask, byte_level_tokenizer

import diptych
from diptych.core.errors import ConfigError
from diptych.core.fleet import Readiness
from diptych.front.settings import FrontSettings
from diptych.front.tenants import TenantKeys

COMPLETION = {"model": "tiny", "prompt": "abc", "max_tokens": 4}


def get(path: str, dispatcher: FakeDispatcher | None = None, **options: Any) -> Any:
    return ask(dispatcher or FakeDispatcher(), path, method="GET", **options)


def test_models() -> None:
    listed = get("/v1/models", served_model_names=("org/tiny", "alias")).json()
    assert [model["id"] for model in listed["data"]] == ["org/tiny", "alias"]
    assert get("/v1/models/org/tiny", served_model_names=("org/tiny",)).json()["max_model_len"] == 256


def test_fleet() -> None:
    assert get("/fleet").json()["workers"][1] == {
        "id": "decode-0",
        "role": "decode",
        "state": "lost",
        "pid": 11,
        "epoch": 7,
        "cut": "tp4 ep4",
        "kv_blocks_total": 9,
        "kv_blocks_used": 3,
        "kv_blocks_cached": 4,
        "running": 1,
        "waiting": 2,
    }


def test_health() -> None:
    for path in ("/health", "/ready", "/live"):
        assert get(path).status_code == 200
    loading = FakeDispatcher(ready=Readiness.NO)
    assert get("/live", loading).status_code == 200
    for path in ("/health", "/ready"):
        response = get(path, loading)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")
        assert response.headers["retry-after"] == "1"


def test_a_fleet_that_cannot_hand_over_serves_and_says_so() -> None:
    assert get("/ready").json() == {"status": "ok"}
    response = get("/ready", FakeDispatcher(ready=Readiness.DEGRADED))
    assert (response.status_code, response.json()["status"]) == (200, "degraded")
    assert "un-split" in response.json()["reason"]


def test_version() -> None:
    assert get("/version").json() == {"version": diptych.__version__}


def test_tokenize_and_back() -> None:
    codec = byte_level_tokenizer()
    answer = ask(FakeDispatcher(), "/tokenize", {"model": "tiny", "prompt": "the cat 你"}).json()
    assert answer == {"tokens": codec.encode("the cat 你"), "count": answer["count"], "max_model_len": 256}
    assert answer["count"] == len(answer["tokens"])
    assert ask(FakeDispatcher(), "/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "the cat 你"}


def test_tokenize_chat_is_what_generation_gets() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    answer = ask(FakeDispatcher(), "/tokenize", {"messages": messages}).json()
    dispatcher = FakeDispatcher()
    ask(dispatcher, "/v1/chat/completions", {"model": "tiny", "messages": messages})
    assert tuple(answer["tokens"]) == dispatcher.streams[0].request.prompt_token_ids
    assert byte_level_tokenizer().encode("<|user|>a\nb<|end|>") == answer["tokens"]


@pytest.mark.fault(10)
def test_long_prompt_is_encoded_in_a_thread_to_the_same_tokens() -> None:
    text = "the cat sat " * 300
    answer = ask(FakeDispatcher(), "/tokenize", {"prompt": text}).json()
    assert answer["tokens"] == byte_level_tokenizer().encode(text)


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    "key", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic right", "Bearer rightx", "right"]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/nothing", "/tokenize", "/detokenize"])
def test_without_the_key(key: str | None, path: str) -> None:
    headers = {} if key is None else {"authorization": key}
    dispatcher = FakeDispatcher()
    response = ask(dispatcher, path, COMPLETION, headers=headers, api_keys=("right",))
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert response.headers["x-request-id"]
    assert dispatcher.streams == []


@pytest.mark.fault(19)
@pytest.mark.parametrize("key", ["Bearer schlüssel".encode(), b"Bearer \xff\xfe", b"Bearer " + b"x" * 1_000_000])
def test_strange_keys(key: bytes) -> None:
    headers: Any = {"authorization": key}
    assert ask(FakeDispatcher(), "/v1/completions", COMPLETION, headers=headers, api_keys=("right",)).status_code == 401


@pytest.mark.fault(57)
def test_with_a_key() -> None:
    dispatcher = FakeDispatcher()
    for key in ("one", "two", "ключ"):
        headers: Any = {"authorization": f"Bearer {key}".encode()}
        keys = ("one", "two", "ключ")
        assert ask(dispatcher, "/v1/completions", COMPLETION, headers=headers, api_keys=keys).status_code == 200
    salts = [stream.request.cache_salt for stream in dispatcher.streams]
    assert len(set(salts)) == 3
    assert all(len(salt) == 16 for salt in salts)
    ask(dispatcher, "/v1/completions", COMPLETION, headers={"authorization": "bearer one"}, api_keys=("one",))
    assert dispatcher.streams[-1].request.cache_salt == ""


@pytest.mark.parametrize("wrong", [{"served_model_names": ()}, {"served_model_names": ("",)}])
def test_settings_that_would_serve_nobody_or_everybody(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        FrontSettings(**{"served_model_names": ("tiny",)} | wrong)


def test_an_empty_key_would_let_everybody_in() -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        TenantKeys.of(("right", ""))


def test_open_paths_need_no_key() -> None:
    for path in ("/health", "/live", "/fleet", "/metrics", "/version"):
        assert get(path, api_keys=("right",)).status_code == 200
