"""What a killed worker costs: two prefill and two decode workers, eight clients with a hundred requests
each, and one worker killed in the middle. Every answer is compared with the right one.

    python -m diptych.bench.survival [--requests 100] [--json FILE]

The engine is the scripted one, so that the right answer is known (`expected_tokens`) and takes a modelled
time, and so that what is measured is the system and not the model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from diptych.bench.server import HOST, free_port, running
from diptych.engine.scripted import expected_tokens

FLAGS = ("--engine", "scripted", "--prefill", "2", "--decode", "2")
NUM_CLIENTS = 8
ROLES = ("decode", "prefill")


@dataclass(slots=True)
class Tally:
    """What became of the requests: how many ended how, and the longest pause between two tokens of each."""

    ends: Counter[str] = field(default_factory=Counter)
    pauses: list[float] = field(default_factory=list)

    def fields(self, role: str) -> dict[str, Any]:
        pauses = sorted(self.pauses)
        return {
            "killed": role,
            "requests": self.ends.total(),
            "identical": self.ends["identical"],
            "failures": {end: count for end, count in self.ends.items() if end != "identical"},
            "p99_longest_pause_ms": round(1e3 * pauses[int(0.99 * (len(pauses) - 1))], 1),
            "max_longest_pause_ms": round(1e3 * pauses[-1], 1),
        }


async def measure(role: str, num_requests: int) -> dict[str, Any]:
    """One run: kill the first worker of a role when a part of the requests is done."""
    port = free_port()
    url = f"http://{HOST}:{port}"
    tally = Tally()
    half_way = asyncio.Event()
    with running((sys.executable, "-m", "diptych", "serve", "--port", str(port), *FLAGS), url):
        async with aiohttp.ClientSession(url) as session:
            clients = [_client(session, seed, num_requests, tally, half_way) for seed in range(NUM_CLIENTS)]
            await asyncio.gather(*clients, _kill_one(session, role, half_way))
    return tally.fields(role)


async def _client(
    session: aiohttp.ClientSession, seed: int, num_requests: int, tally: Tally, half_way: asyncio.Event
) -> None:
    """Ask one thing after another; the first client to be half way says so."""
    rng = random.Random(seed)
    for number in range(num_requests):
        if 2 * number >= num_requests:
            half_way.set()
        prompt = [rng.randrange(1, 256) for _ in range(rng.randrange(20, 400))]
        end, pause = await _ask(session, prompt, rng.randrange(5, 60))
        tally.ends[end] += 1
        tally.pauses.append(pause)


async def _ask(session: aiohttp.ClientSession, prompt: list[int], num_tokens: int) -> tuple[str, float]:
    """One stream: how it ended ("identical" if all is well), and its longest pause between tokens (s)."""
    body = {
        "model": "scripted",
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    token_ids: list[int] = []
    times: list[float] = []
    async with session.post("/v1/completions", json=body) as response:
        if response.status != 200:
            return f"HTTP {response.status}", 0.0
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                return str(event["error"]["code"]), 0.0
            times.append(time.monotonic())
            token_ids += [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
    pause = max((later - earlier for earlier, later in zip(times, times[1:], strict=False)), default=0.0)
    return "identical" if token_ids == expected_tokens(prompt, num_tokens) else "other tokens", pause


async def _kill_one(session: aiohttp.ClientSession, role: str, half_way: asyncio.Event) -> None:
    await half_way.wait()
    async with session.get("/fleet") as response:
        fleet = await response.json()
    os.kill(next(worker["pid"] for worker in fleet["workers"] if worker["role"] == role), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100, help="of each client")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [asyncio.run(measure(role, arguments.requests)) for role in ROLES]
    for row in rows:
        print(
            f"{row['killed']:<8} worker killed: {row['identical']} of {row['requests']} answers identical, "
            f"failures {row['failures'] or 'none'}, longest pause p99 {row['p99_longest_pause_ms']} ms, "
            f"max {row['max_longest_pause_ms']} ms"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
