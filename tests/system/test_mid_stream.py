"""A worker dies in mid-stream, and everything that a client can ask for comes out as if it had not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from server import SCRIPTED, Server, is_idle, serving, soon

PROMPT = "Codes: heron 471, maple 902, birch 118, comet 350. What is the code of maple?"
LENGTH = 160
KILL_AT = 10  # events
PENALTIES = {"frequency_penalty": 0.4, "presence_penalty": 0.2, "repetition_penalty": 1.1}
SEEDED = {"temperature": 1.0, "top_p": 0.95, "seed": 7}
ENDLESS = {"ignore_eos": True, "max_tokens": LENGTH}


@pytest.fixture(scope="module")
def model() -> Iterator[Server]:
    """The model that comes along, in float32."""
    with serving("--dtype", "float32", "--max-model-len", "512", "--decode", "2") as server:
        yield server


@pytest.fixture(scope="module")
def script() -> Iterator[Server]:
    with serving(*SCRIPTED, "--decode", "2") as server:
        yield server


def ask(server: Server, *, kill: bool, **fields: Any) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """What each choice of one stream came to, and its usage; with `kill`, its decode worker dies in the middle."""
    body = server.body(PROMPT, stream=True, stream_options={"include_usage": True}, **fields)
    choices: dict[int, dict[str, Any]] = {}
    usage: dict[str, Any] = {}
    headers = {"x-diptych-prefer": "split"}
    with server.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        assert response.status_code == 200, response.read()
        victim = server.fleet()[response.headers["x-diptych-route"].split("decode=")[1].split(";")[0]]
        for number, line in enumerate(line for line in response.iter_lines() if line.startswith("data: {")):
            if kill and number == KILL_AT:
                os.kill(victim["pid"], signal.SIGKILL)
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                so_far = choices.setdefault(choice["index"], {"ids": [], "text": "", "logprobs": [], "finish": None})
                so_far["ids"] += choice["token_ids"]
                so_far["text"] += choice["text"]
                so_far["logprobs"] += (choice.get("logprobs") or {}).get("token_logprobs", [])
                so_far["finish"] = choice["finish_reason"] or so_far["finish"]
    if kill:
        soon(lambda: server.fleet()[victim["id"]]["epoch"] == victim["epoch"] + 1, "it comes back", within=60.0)
        soon(lambda: server.http.get("/ready").status_code == 200, "it is trusted", within=60.0)
    soon(lambda: is_idle(server), "all blocks are given back")
    return choices, usage


@pytest.mark.fault(32)
def test_the_answer_is_that_of_the_undisturbed_run(model: Server) -> None:
    fields = ENDLESS | SEEDED | PENALTIES | {"logprobs": 2, "n": 3, "logit_bias": {"7": 1.5}, "min_tokens": 100}
    calm, calm_usage = ask(model, kill=False, **fields)
    killed, killed_usage = ask(model, kill=True, **fields)
    assert {index: choice["ids"] for index, choice in killed.items()} == {i: c["ids"] for i, c in calm.items()}
    assert [len(choice["ids"]) for choice in killed.values()] == [LENGTH] * 3
    for index, choice in killed.items():
        assert (choice["text"], choice["finish"]) == (calm[index]["text"], "length")
        assert choice["logprobs"] == pytest.approx(calm[index]["logprobs"], abs=1e-3)
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert killed_usage[count] == calm_usage[count]


def test_a_stop_string_is_found_across_the_seam(script: Server) -> None:
    calm, _ = ask(script, kill=False, **ENDLESS, **SEEDED)
    text = calm[0]["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 6]
    calm, calm_usage = ask(script, kill=False, **ENDLESS, **SEEDED, stop=[stop])
    killed, killed_usage = ask(script, kill=True, **ENDLESS, **SEEDED, stop=[stop])
    assert killed[0]["finish"] == "stop"
    assert (killed[0]["text"], killed_usage["completion_tokens"]) == (calm[0]["text"], calm_usage["completion_tokens"])
    assert text.startswith(killed[0]["text"])


@pytest.mark.fault(32)
def test_without_a_seed_nothing_is_lost_or_doubled(script: Server) -> None:
    choices, usage = ask(script, kill=True, **ENDLESS, temperature=1.0, n=2)
    assert [len(choice["ids"]) for choice in choices.values()] == [LENGTH, LENGTH]
    assert usage["completion_tokens"] == 2 * LENGTH
