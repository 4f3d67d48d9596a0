"""After hundreds of visitors of all kinds, most of whom leave at some point in the middle, nothing is left of them."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import httpx
import pytest
from server import SCRIPTED, Server, is_idle, prefer_header, serving, soon

from diptych.core.blocks import blocks_for
from diptych.core.request import SamplingParams
from diptych.engine.scripted import expected_tokens

IN_FLIGHT = 32
BLOCK_SIZE = 16
LONGEST_PROMPT = 400
INVALID: tuple[dict[str, Any], ...] = ({"max_tokens": -1}, {"temperature": 9}, {"model": "other"}, {"prompt": []})


class Leaves(StrEnum):
    """When a client goes away."""

    NEVER = "never"
    SENDING = "while it sends"
    BEFORE_HEADERS = "before headers"
    AFTER_HEADERS = "after headers"
    MID_STREAM = "in mid-stream"
    AFTER_LAST_TOKEN = "after the last token"


OF_STREAMS = tuple(Leaves)
OF_OTHERS = (Leaves.NEVER, Leaves.SENDING, Leaves.BEFORE_HEADERS)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One request; `wait` (seconds) and `events` (of a stream) say when exactly its client leaves."""

    path: str
    body: dict[str, Any]
    prefer: str | None
    leaves: Leaves
    valid: bool
    wait: float
    events: int


def visits(number: int, context: int) -> list[Visit]:
    """Those who leave early want so many tokens that it shows if their requests go on without them."""
    chance = random.Random(20)
    return [_visit(chance, context) for _ in range(number)]


def _visit(chance: random.Random, context: int) -> Visit:
    prompt = [chance.randrange(32, 127) for _ in range(int(LONGEST_PROMPT ** chance.random()))]
    chat, stream = chance.random() < 0.3, chance.random() < 0.6
    leaves = chance.choice(OF_STREAMS if stream else OF_OTHERS)
    hears_all = leaves in (Leaves.NEVER, Leaves.AFTER_LAST_TOKEN)
    body: dict[str, Any] = {
        "model": "scripted",
        "max_tokens": chance.randrange(1, 60) if hears_all else context - 2 * LONGEST_PROMPT,
        "temperature": chance.choice((0, 1)),
        "seed": chance.randrange(2**32),
        "stream": stream,
        "return_token_ids": True,
    }
    body |= {"messages": [{"role": "user", "content": bytes(prompt).decode()}]} if chat else {"prompt": prompt}
    valid = chance.random() < 0.9
    if not valid:
        body |= chance.choice(INVALID[: 3 if chat else 4])
    return Visit(
        path="/v1/chat/completions" if chat else "/v1/completions",
        body=body,
        prefer=chance.choice((None, "split", "local")),
        leaves=leaves,
        valid=valid,
        wait=chance.choice((0.0, 0.3)) * chance.random(),
        events=chance.randrange(1, 20),
    )


async def carry_out(client: httpx.AsyncClient, visit: Visit) -> str:
    """Returns how it ended: refused, answered, or left."""
    try:
        async with asyncio.timeout(visit.wait if visit.leaves is Leaves.BEFORE_HEADERS else None):
            content = _half(visit.body) if visit.leaves is Leaves.SENDING else json.dumps(visit.body).encode()
            headers = {"content-type": "application/json"} | prefer_header(visit.prefer)
            request = client.build_request("POST", visit.path, content=content, headers=headers)
            response = await client.send(request, stream=True)
    except (TimeoutError, InterruptedError):
        return "left"
    try:
        if not visit.valid:
            assert response.status_code in (400, 404)
            return "refused"
        assert response.status_code == 200, await response.aread()
        if visit.leaves in (Leaves.BEFORE_HEADERS, Leaves.AFTER_HEADERS):
            return "left"
        answer = await _read(response, visit)
    finally:
        await response.aclose()
    if answer is None:
        return "left"
    assert answer == expected(visit)
    return "answered"


async def _half(body: dict[str, Any]) -> AsyncIterator[bytes]:
    content = json.dumps(body).encode()
    yield content[: len(content) // 2]
    raise InterruptedError


async def _read(response: httpx.Response, visit: Visit) -> list[int] | None:
    """Token ids of a whole answer; None if the client left before."""
    if not visit.body["stream"]:
        return list(json.loads(await response.aread())["choices"][0]["token_ids"])
    token_ids: list[int] = []
    events = 0
    async for line in response.aiter_lines():
        if line == "data: [DONE]" and visit.leaves is Leaves.AFTER_LAST_TOKEN:
            break
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                token_ids += choice["token_ids"]
            events += 1
            if visit.leaves is Leaves.MID_STREAM and events == visit.events:
                return None
    return token_ids


def expected(visit: Visit) -> list[int]:
    if "messages" in visit.body:
        prompt = list(f"user: {visit.body['messages'][0]['content']}\nassistant: ".encode())
    else:
        prompt = visit.body["prompt"]
    sampling = SamplingParams(temperature=visit.body["temperature"], seed=visit.body["seed"])
    return expected_tokens(prompt, visit.body["max_tokens"], sampling)


async def carry_out_all(server: Server, to_come: list[Visit]) -> Counter[str]:
    ends: Counter[str] = Counter()
    waiting = iter(to_come)

    async def one_after_another(client: httpx.AsyncClient) -> None:
        for visit in waiting:
            ends[await carry_out(client, visit)] += 1

    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60.0, limits=limits, trust_env=False) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(IN_FLIGHT):
            group.create_task(one_after_another(client))
    return ends


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("number", "transport", "context", "kv_tokens"),
    [(500, "shm", 4096, 65536), (250, "tcp", 1024, 1024)],
    ids=["with room for all", "with room for one"],
)
def test_nothing_is_left_of_clients_that_left(number: int, transport: str, context: int, kv_tokens: int) -> None:
    limits = ("--max-model-len", str(context), "--kv-cache-tokens", str(kv_tokens), "--block-size", str(BLOCK_SIZE))
    with serving(*SCRIPTED, "--transport", transport, *limits) as server:
        ends = asyncio.run(carry_out_all(server, visits(number, context)))
        assert ends.total() == number
        assert min(ends[end] for end in ("answered", "left", "refused")) > number // 50
        soon(lambda: is_idle(server), "all blocks are given back")
        assert server.metric("diptych_requests_in_flight") == 0
        for prefer in ("split", "local"):
            only_the_blocks_of_one_live_request(server, prefer)


def only_the_blocks_of_one_live_request(server: Server, prefer: str) -> None:
    """While it is served correctly, its blocks are in use; when it has ended they are not."""
    prompt, max_tokens = list(b"still there?" * 10), 150
    with server.stream(prompt, prefer, max_tokens=max_tokens) as stream:
        token_ids = [next(stream.token_ids)]
        soon(lambda: server.fleet()["decode-0"]["running"] == 1, "it runs")
        held = {name: worker["kv_blocks_used"] for name, worker in server.fleet().items()}
        assert held["prefill-0"] == 0
        least, most = blocks_for(len(prompt), BLOCK_SIZE), blocks_for(len(prompt) + max_tokens, BLOCK_SIZE)
        assert least <= held["decode-0"] <= most
        token_ids += stream.token_ids
    assert token_ids == expected_tokens(prompt, max_tokens)
    soon(lambda: is_idle(server), "its blocks are given back")
