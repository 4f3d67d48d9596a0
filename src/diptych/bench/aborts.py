"""How long the KV blocks of a request stay taken once its client has hung up, in both pools.

    python -m diptych.bench.aborts [--engine torch|scripted] [--count 60] [--json FILE]

One prefill and one decode worker. A client sends a long prompt and closes its connection at a random moment: while
the prompt is computed, or while it is answered; alone, or beside others that decode and send prompts of their own.

Times come from the journals of router and workers, which record the moment of every event: `/fleet` shows loads that
are up to 20 ms old (`worker.loop.REPORT_SECONDS`) and would have to be asked again and again. All processes are on one
machine, so the monotonic clock is the same for all (clock_gettime(2)). What keeping journals costs is in the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.bench.metrics import distribution
from diptych.bench.server import HOST, free_port, running

ROLES = ("prefill", "decode")
NAMES = {"torch": "recall", "scripted": "scripted"}
PROMPT_TOKENS = (200, 1900)  # of those who leave; the built-in model's context has 2,048
OTHER_PROMPT_TOKENS, OTHER_STREAMS = 600, 3
TOP_TOKEN = 200
SETTLE_SECONDS = 0.5  # far more than any of it takes; what is not free by then is reported
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

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._model = model

    @contextlib.asynccontextmanager
    async def _sent(self, prompt: Sequence[int], max_tokens: int) -> Any:
        body = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
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

    async def ask(self, prompt: Sequence[int], max_tokens: int) -> None:
        """Read a whole answer."""
        async with self._sent(prompt, max_tokens) as sock:
            while await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
                pass


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


async def _leave_one_after_another(client: Client, case: Case, count: int, chance: random.Random) -> list[float]:
    """When each of them left."""
    leaving = []
    for _ in range(count):
        prompt = _prompt(chance, chance.randrange(*PROMPT_TOKENS))
        seconds = chance.uniform(0.005, 0.1 + len(prompt) / 5000)
        leaving.append(await client.hang_up(prompt, seconds, after_first_token=case.while_decoding))
        await asyncio.sleep(SETTLE_SECONDS)
    return leaving


async def _run(client: Client, case: Case, count: int) -> list[float]:
    chance = random.Random(case.name)
    await client.ask(_prompt(chance, PROMPT_TOKENS[1]), 8)  # everything has been used once
    others = asyncio.create_task(_others(client, chance)) if case.with_others else None
    try:
        if others is not None:
            await asyncio.sleep(SETTLE_SECONDS)
        return await _leave_one_after_another(client, case, count, chance)
    finally:
        if others is not None:
            others.cancel()
            await asyncio.gather(others, return_exceptions=True)


def measure(case: Case, count: int, engine: str = "torch") -> list[Freed]:
    """Let `count` clients leave, one after another, a server of their own."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        flags = ("--port", str(port), "--engine", engine, "--journal", directory)
        with running((sys.executable, "-m", "diptych", "serve", *flags), f"http://{HOST}:{port}"):
            leaving = asyncio.run(_run(Client(port, NAMES[engine]), case, count))
            time.sleep(SETTLE_SECONDS)
        return read_journals(Path(directory), leaving)


def read_journals(directory: Path, leaving: Sequence[float]) -> list[Freed]:
    """What became of the requests of the clients that left then, in order."""
    cancelled = _cancellations(directory / "router.jsonl")
    workers = {role: list(_lines(directory / f"{role}-0.jsonl")) for role in ROLES}
    found = []
    for index, left in enumerate(leaving):
        until = leaving[index + 1] if index + 1 < len(leaving) else float("inf")
        request_ids = [(when, name) for when, name in cancelled if left <= when < until]
        if not request_ids:
            continue  # it had not been accepted yet
        when, name = request_ids[0]
        freed = Freed(when - left)
        for role, lines in workers.items():
            heard, free = _end_of(name, lines)
            if heard is not None and free is not None:
                freed.heard[role], freed.blocks[role] = heard - left, free - left
        found.append(freed)
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        yield from map(json.loads, file)


def _cancellations(path: Path) -> list[tuple[float, str]]:
    """When the router heard that a client was gone, and under which name workers knew its request."""
    return [
        (line["t"], line["actions"][0]["request_id"])
        for line in _lines(path)
        if line["event"]["kind"] == "RequestCancelled" and line["actions"]
    ]


def _end_of(request_id: str, lines: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """When a worker heard that it should give a request up, and when it had given all of its blocks back. The last of
    these lines counts: the request is forgotten first, and its blocks may be in quarantine after that."""
    heard = free = None
    for line in lines:
        event = line["event"]
        concerns = event.get("request_id") == request_id
        if concerns and event["kind"] == "AbortRequested":
            heard = line["t"]
        forgotten = any(
            action["kind"] == "ForgetRequest" and action["request_id"] == request_id for action in line["actions"]
        )
        if forgotten or (concerns and event["kind"] in RELEASING):
            free = line["t"]
    return heard, free


def fields(case: Case, found: Sequence[Freed]) -> dict[str, Any]:
    """One row of the report, in milliseconds from the hanging up."""
    row: dict[str, Any] = {"case": case.name, "disconnects": len(found)}
    row |= distribution("router_knows", [freed.router for freed in found])
    for role in ROLES:
        row |= distribution(f"{role}_worker_knows", [freed.heard[role] for freed in found if role in freed.heard])
        row |= distribution(f"{role}_blocks_free", [freed.blocks[role] for freed in found if role in freed.blocks])
    return row | distribution("all_blocks_free", [max(freed.blocks.values()) for freed in found if freed.blocks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=NAMES, default="torch")
    parser.add_argument("--count", type=int, default=60, help="disconnects of each case")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(fields(case, measure(case, arguments.count, arguments.engine)))
        figures = (rows[-1][f"{name}_all_blocks_free_ms"] for name in ("median", "p90", "p99", "max"))
        print(f"{case.name:<34} all blocks free after (median, p90, p99, max):", *figures, "ms", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"engine": arguments.engine, "aborts": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
