"""How long the KV blocks of a request stay taken once its client has hung up, in both pools.

    python -m diptych.bench.aborts [--models built-in,32M,scripted] [--count 40] [--json FILE]

One prefill and one decode worker. A client sends a long prompt and closes its connection at a random moment: while
the prompt is computed, or while it is answered; alone, or beside others that decode and send prompts of their own.
The models are the one that comes along, the random one of `make bench`, whose steps are long, and the scripted engine.

Times come from the journals of router and workers, which record the moment of every event: `/fleet` shows loads that
are up to 20 ms old (`worker.loop.REPORT_SECONDS`) and would have to be asked again and again. All processes are on one
machine, so the monotonic clock is the same for all (clock_gettime(2)). What keeping journals costs is in the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.bench.metrics import distribution
from diptych.bench.server import HOST, free_port, running

ROLES = ("prefill", "decode")
NAME = "served"
PROMPT_TOKENS = (200, 1900)  # of those who leave; the built-in model's context has 2,048
OTHER_PROMPT_TOKENS, OTHER_STREAMS = 600, 3
TOP_TOKEN = 200
DECODING_SECONDS = 0.4
SETTLE_SECONDS = 0.4  # more than any of it takes
RELEASING = ("PushStopped", "PushAccepted", "WriterGone")  # events that end a hand-off's hold on blocks


@dataclass(frozen=True, slots=True)
class Case:
    """When clients leave: before the first token, or after some; and whether there are others."""

    name: str
    while_decoding: bool
    with_others: bool


CASES = (
    Case("while it prefills", while_decoding=False, with_others=False),
    Case("while it decodes", while_decoding=True, with_others=False),
    Case("while it prefills, beside others", while_decoding=False, with_others=True),
    Case("while it decodes, beside others", while_decoding=True, with_others=True),
)


@dataclass(slots=True)
class Freed:
    """One request's end: seconds from the moment its client hung up. Roles that had no blocks of it are missing."""

    router: float  # it knows
    heard: dict[str, float] = field(default_factory=dict)  # the worker knows
    blocks: dict[str, float] = field(default_factory=dict)  # all are free


class Client:
    """Talks HTTP/1.1 over bare sockets, so that the moment of hanging up is known."""

    def __init__(self, port: int) -> None:
        self._port = port

    @contextlib.asynccontextmanager
    async def _sent(self, prompt: Sequence[int], max_tokens: int) -> Any:
        body = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True}
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n"
        head += f"x-diptych-prefer: split\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n"
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, (HOST, self._port))
            await loop.sock_sendall(sock, head.encode() + content)
            yield sock

    async def hang_up(self, prompt: Sequence[int], seconds: float, *, after_first_token: bool) -> float:
        """Ask, and leave so many seconds later (than the first token, or than the question). Returns when that was."""
        async with self._sent(prompt, max_tokens=2000 - len(prompt)) as sock:
            loop = asyncio.get_running_loop()
            with contextlib.suppress(TimeoutError):
                while after_first_token and b"data: " not in await loop.sock_recv(sock, 1 << 16):
                    pass
                async with asyncio.timeout(seconds):
                    while await loop.sock_recv(sock, 1 << 16):
                        pass
            left = time.monotonic()
            sock.close()
            return left

    async def ask(self, prompt: Sequence[int], max_tokens: int) -> float:
        """Read a whole answer. Returns how long its first token took."""
        began, first = time.monotonic(), None
        async with self._sent(prompt, max_tokens) as sock:
            while content := await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
                if first is None and b"data: " in content:
                    first = time.monotonic() - began
        return first or 0.0


async def _others(client: Client, chance: random.Random) -> None:
    """Streams that decode, and one prompt after another, until cancelled."""

    async def again_and_again(prompt_tokens: int, max_tokens: int) -> None:
        while True:
            await client.ask(_prompt(chance, prompt_tokens), max_tokens)

    async with asyncio.TaskGroup() as group:
        group.create_task(again_and_again(OTHER_PROMPT_TOKENS, 8))
        for _ in range(OTHER_STREAMS):
            group.create_task(again_and_again(50, 1500))


def _prompt(chance: random.Random, length: int) -> list[int]:
    return [chance.randrange(4, TOP_TOKEN) for _ in range(length)]


async def _leave_one_after_another(client: Client, case: Case, count: int) -> list[float]:
    """When each of them left: at any moment of a prefill, or of about a hundred steps."""
    chance = random.Random(case.name)
    longest = PROMPT_TOKENS[1]
    prefill_seconds = statistics.median([await client.ask(_prompt(chance, longest), 8) for _ in range(3)])
    leaving = []
    for _ in range(count):
        prompt = _prompt(chance, chance.randrange(*PROMPT_TOKENS))
        most = DECODING_SECONDS if case.while_decoding else prefill_seconds * len(prompt) / longest
        seconds = chance.uniform(0.0, most)
        leaving.append(await client.hang_up(prompt, seconds, after_first_token=case.while_decoding))
        await asyncio.sleep(SETTLE_SECONDS)
    return leaving


async def _run(client: Client, case: Case, count: int) -> list[float]:
    others = asyncio.create_task(_others(client, random.Random(0))) if case.with_others else None
    try:
        return await _leave_one_after_another(client, case, count)
    finally:
        if others is not None:
            others.cancel()
            await asyncio.gather(others, return_exceptions=True)


def measure(model: str, count: int, cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """One row for each case: so many clients leave, one after another. A server serves them all. Raises ValueError if
    blocks never come back."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        command = (sys.executable, "-m", "diptych", "serve", *_model_flags(model, Path(directory)))
        flags = ("--port", str(port), "--served-model-name", NAME, "--journal", directory)
        leaving = []
        with running((*command, *flags), f"http://{HOST}:{port}") as server:
            for case in cases:
                leaving.append(asyncio.run(_run(Client(port), case, count)))
                time.sleep(SETTLE_SECONDS)
                _check_nothing_is_left(server.url)
        journals = Journals(Path(directory))
        return [
            {"model": model, "case": case.name} | fields([journals.freed(when) for when in each], count)
            for case, each in zip(cases, leaving, strict=True)
        ]


def _check_nothing_is_left(url: str) -> None:
    """Everybody has gone. Raises ValueError if a worker still holds blocks of somebody."""
    with urllib.request.urlopen(f"{url}/fleet", timeout=10) as response:
        held = {worker["id"]: worker["kv_blocks_used"] for worker in json.load(response)["workers"]}
    if any(held.values()):
        raise ValueError(f"blocks that never came back: {held}")


def _model_flags(model: str, directory: Path) -> tuple[str, ...]:
    match model:
        case "built-in":
            return ()
        case "scripted":
            return ("--engine", "scripted")
        case "32M":
            subprocess.run((sys.executable, "-m", "diptych.bench.checkpoint", str(directory / "model")), check=True)
            return (str(directory / "model"),)
    raise ValueError(f"no model {model}")


class Journals:
    """What router and workers have recorded."""

    def __init__(self, directory: Path) -> None:
        self._cancelled = list(_cancellations(directory / "router.jsonl"))
        self._ends = {role: _ends(directory / f"{role}-0.jsonl") for role in ROLES}

    def freed(self, left: float) -> Freed | None:
        """What became of the request of the client that left then. None if it had not been accepted yet."""
        index = bisect.bisect(self._cancelled, (left, ""))
        if index == len(self._cancelled) or self._cancelled[index][0] > left + SETTLE_SECONDS:
            return None
        when, request_id = self._cancelled[index]
        freed = Freed(when - left)
        for role, ends in self._ends.items():
            end = ends.get(request_id)
            if end is not None and end.heard is not None and end.free is not None:
                freed.heard[role], freed.blocks[role] = end.heard - left, max(end.free, end.heard) - left
        return freed


@dataclass(slots=True)
class _End:
    """When a worker heard that it should give a request up, and when it had given all of its blocks back."""

    heard: float | None = None
    free: float | None = None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        yield from map(json.loads, file)


def _cancellations(path: Path) -> Iterator[tuple[float, str]]:
    """When the router heard that a client was gone, and under which name workers knew its request."""
    for line in _lines(path):
        if line["event"]["kind"] == "RequestCancelled" and line["actions"]:
            yield line["t"], line["actions"][0]["request_id"]


def _ends(path: Path) -> dict[str, _End]:
    """Of each request at one worker. It is forgotten first, and its blocks may be in quarantine after that: so the last
    line of either kind counts."""
    ends: dict[str, _End] = {}
    for line in _lines(path):
        event = line["event"]
        if event["kind"] == "AbortRequested":
            ends.setdefault(event["request_id"], _End()).heard = line["t"]
        let_go = [action["request_id"] for action in line["actions"] if action["kind"] == "ForgetRequest"]
        if event["kind"] in RELEASING:
            let_go.append(event["request_id"])
        for request_id in let_go:
            ends.setdefault(request_id, _End()).free = line["t"]
    return ends


def fields(found: Sequence[Freed | None], count: int) -> dict[str, Any]:
    """The figures of one case, in milliseconds from the hanging up."""
    accepted = [freed for freed in found if freed is not None]
    row: dict[str, Any] = {"disconnects": count, "accepted": len(accepted)}
    row |= distribution("router_knows", [freed.router for freed in accepted])
    for role in ROLES:
        row[f"{role}_requests"] = sum(role in freed.blocks for freed in accepted)
        row |= distribution(f"{role}_knows", [freed.heard[role] for freed in accepted if role in freed.heard])
        row |= distribution(f"{role}_free", [freed.blocks[role] for freed in accepted if role in freed.blocks])
    return row | distribution("all_free", [max(freed.blocks.values()) for freed in accepted if freed.blocks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="built-in,32M,scripted", help="which of them, separated by commas")
    parser.add_argument("--count", type=int, default=40, help="disconnects of each case")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.models.split(","):
        rows += measure(model, arguments.count)
        for row in rows[-len(CASES) :]:
            figures = (row[f"{statistic}_all_free_ms"] for statistic in ("median", "p90", "p99", "max"))
            print(f"{model:<10}{row['case']:<34} all blocks free after (median, p90, p99, max):", *figures, "ms")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
