"""Bad input of every kind is refused by the real server, and harms nobody: not another client's stream, not the blocks.

What exactly is refused, and how it is said, is the front's own test; here are a few cases of each kind.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
from server import SCRIPTED, Server, is_idle, serving, soon

from diptych.engine.scripted import expected_tokens

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CONTEXT = 4096
PROMPT = list(b"a long story")
STORY_TOKENS = 3900  # takes the scripted engine longer than all the rest of this test
HEARD_TOKENS = 500


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is sent (a dict as JSON), and the error that it gets."""

    body: bytes | dict[str, Any] = b""
    path: str = COMPLETIONS
    method: str = "POST"
    content_type: str = "application/json"
    status: int = 400
    code: str = "invalid_value"
    param: str | None = None


def malformed(body: bytes, path: str = COMPLETIONS, **error: Any) -> Case:
    return Case(body=body, path=path, **{"code": "invalid_json"} | error)


def completion(param: str, **fields: Any) -> Case:
    return Case(body={"model": "scripted", "prompt": "cat"} | fields, param=param)


def too_long(**fields: Any) -> Case:
    body = {"model": "scripted"} | fields
    return Case(body=body, code="context_length_exceeded", param="prompt")


def chat(param: str, *messages: dict[str, Any], code: str = "invalid_value") -> Case:
    return Case(body={"model": "scripted", "messages": messages}, path=CHAT, code=code, param=param)


def unknown_model(name: str) -> Case:
    body = {"model": name, "prompt": "cat"}
    return Case(body=body, status=404, code="model_not_found", param="model")


CASES: dict[str, list[Case]] = {
    "malformed JSON": [
        malformed(b'{"model": "scripted", "prompt"'),
        malformed(b"{'model': 'scripted'}", CHAT),
        malformed(b""),
        malformed(b"[1]"),
    ],
    "characters that are none": [
        malformed(b'{"model": "scripted", "prompt": "\xff"}'),
        malformed(b'{"model": "scripted", "prompt": "\\ud800"}', code="invalid_text", param="prompt"),
        Case(body={"model": "scripted", "prompt": "a\0b"}, code="invalid_text", param="prompt"),
        chat("messages[0].content", {"role": "user", "content": "\0"}, code="invalid_text"),
    ],
    "JSON bombs": [
        malformed(b"[" * 100_000),
        malformed(b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        malformed(b'{"model": "scripted", "prompt": "a", "prompt": "b"}', param="prompt"),
        malformed(b'{"model": "scripted", "prompt": "a", "temperature": NaN}'),
        malformed(b'{"model": "scripted", "prompt": "a", "temperature": 1e400}'),
        Case(body=b'{"model": "scripted", "prompt": "a", "seed": 1%b}' % (b"0" * 400), param="seed"),
        Case(body={f"key {i}": i for i in range(100_000)}, code="too_many_fields"),
        malformed(b"[" * 5_000_000, status=413, code="request_too_large"),
    ],
    "max_tokens": [
        *[completion("max_tokens", max_tokens=value) for value in (-1, 0, 1.5, "7")],
        Case(
            body={"model": "scripted", "prompt": "a", "max_tokens": 10**18},
            code="context_length_exceeded",
            param="max_tokens",
        ),
    ],
    "n": [
        completion("n", n=10**9),
        completion("n", n=2, temperature=0),
        Case(
            body={"model": "scripted", "prompt": "a", "n": 2, "best_of": 1},
            code="unsupported_parameter",
            param="best_of",
        ),
    ],
    "sampling": [
        completion("temperature", temperature=-1),
        completion("top_p", top_p=1.5),
        completion("frequency_penalty", frequency_penalty=3),
        completion("presence_penalty", presence_penalty=-3),
        completion("min_tokens", min_tokens=5, max_tokens=4),
    ],
    "too long": [
        too_long(prompt=[65] * (CONTEXT + 1)),
        too_long(prompt=[65] * (CONTEXT - 9), max_tokens=10),
        too_long(prompt="a" * 1_000_000),
    ],
    "nothing to answer": [
        completion("prompt", prompt=""),
        completion("prompt", prompt=[]),
        chat("messages"),
        chat("messages[0].role", {"role": "wizard", "content": "abracadabra"}),
        chat(
            "messages[0].role",
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
            code="unsupported_parameter",
        ),
    ],
    "token ids": [completion("prompt", prompt=[65, value]) for value in (-1, 256, 2**63)],
    "models": [unknown_model(name) for name in ("other", "Scripted", "../../etc/passwd")],
    "HTTP": [
        Case(body={}, content_type="text/plain", status=415, code="unsupported_media_type"),
        Case(method="GET", status=405, code="method_not_allowed"),
        Case(method="OPTIONS", path=CHAT, status=405, code="method_not_allowed"),
        Case(path="/fleet", status=405, code="method_not_allowed"),
        Case(method="GET", path="/v1/nothing", status=404, code="path_not_found"),
    ],
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(*SCRIPTED) as server:
        yield server


def check_refusal(server: Server, case: Case) -> None:
    content = case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
    headers = {"content-type": case.content_type}
    response = server.http.request(case.method, case.path, content=content, headers=headers)
    assert response.status_code == case.status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (case.code, case.param)
    assert 0 < len(error["message"]) < 300


@pytest.mark.fault(1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 18)
def test_nobody_is_harmed(server: Server) -> None:
    """All of it, while another client listens to a long stream."""
    with server.stream(PROMPT, "split", max_tokens=STORY_TOKENS) as story:
        token_ids = [next(story.token_ids)]
        for cases in CASES.values():
            for case in cases:
                check_refusal(server, case)
        fleet = server.fleet()
        assert [worker["running"] for worker in fleet.values()] == [1, 0]  # decode-0, prefill-0
        assert fleet["prefill-0"]["kv_blocks_used"] == 0
        token_ids += islice(story.token_ids, HEARD_TOKENS)
    assert token_ids == expected_tokens(PROMPT, STORY_TOKENS)[: len(token_ids)]
    soon(lambda: is_idle(server), "all blocks are given back")


@pytest.mark.fault(8)
def test_the_longest_prompt_that_fits_is_served(server: Server) -> None:
    prompt = [65] * (CONTEXT - 1)
    for prefer in ("split", "local"):
        assert server.complete(prompt, prefer, max_tokens=1).token_ids == expected_tokens(prompt, 1)


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /v1/models HTTP/1.0", 200),
        ("GET http://elsewhere.invalid/v1/models HTTP/1.1", 200),
        ("HEAD /v1/completions HTTP/1.1", 405),
        ("GET /../../etc/passwd HTTP/1.1", 404),
        ("BREW /v1/models HTTP/1.1", 400),
        ("GET /v1/models HTTP/9.9", 400),
        ("hello", 400),
    ],
)
def test_unusual_request_lines(server: Server, request_line: str, status: int) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with closing(socket.create_connection((host, int(port)), timeout=30)) as connection:
        connection.sendall(f"{request_line}\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    if status >= 400 and not request_line.startswith("HEAD"):
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
