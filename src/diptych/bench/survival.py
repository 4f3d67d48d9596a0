"""What killed workers cost: two prefill and two decode workers, eight clients with a hundred requests each, and
workers killed in the middle. Every answer is compared with the right one.

    python -m diptych.bench.survival [--requests 100] [--json FILE] [SCENARIO ...]

One worker of a role is killed once. All workers of a role are kept dead for a while: killed again as soon as they are
back. All workers of both roles are killed once; then a client that is refused (503) comes back when it is told to.

The engine is the scripted one, so that the right answer is known (`expected_tokens`) and takes a modelled
time, and so that what is measured is the system and not the model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
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
ALL_ROLES = ("prefill", "decode")
OUTAGE_SECONDS = 5.0
LOOK_EVERY = 0.05  # seconds, for workers that have come back during an outage


@dataclass(frozen=True, slots=True)
class Scenario:
    """Who is killed: workers of these roles, one or all, and for how long they are kept dead (s)."""

    name: str
    roles: tuple[str, ...]
    everyone: bool = False
    outage: float = 0.0


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("one-decode", ("decode",)),
        Scenario("one-prefill", ("prefill",)),
        Scenario("all-decode", ("decode",), everyone=True, outage=OUTAGE_SECONDS),
        Scenario("all-prefill", ("prefill",), everyone=True, outage=OUTAGE_SECONDS),
        Scenario("everything", ALL_ROLES, everyone=True),
    )
}


@dataclass(slots=True)
class Tally:
    """What became of the requests: how many ended how, how often one was refused before it was accepted, how many were
    served un-split, and the longest pause between two tokens of each."""

    ends: Counter[str] = field(default_factory=Counter)
    refusals: int = 0
    unsplit: int = 0
    killed: int = 0
    pauses: list[float] = field(default_factory=list)

    def fields(self, scenario: str) -> dict[str, Any]:
        pauses = sorted(self.pauses)
        return {
            "scenario": scenario,
            "workers_killed": self.killed,
            "requests": self.ends.total(),
            "identical": self.ends["identical"],
            "failures": {end: count for end, count in self.ends.items() if end != "identical"},
            "refusals": self.refusals,
            "unsplit": self.unsplit,
            "p99_longest_pause_ms": round(1e3 * pauses[int(0.99 * (len(pauses) - 1))], 1),
            "max_longest_pause_ms": round(1e3 * pauses[-1], 1),
        }


async def measure(scenario: Scenario, num_requests: int) -> dict[str, Any]:
    """One run: workers are killed when a part of the requests is done."""
    port = free_port()
    url = f"http://{HOST}:{port}"
    tally = Tally()
    half_way = asyncio.Event()
    with running((sys.executable, "-m", "diptych", "serve", "--port", str(port), *FLAGS), url):
        async with aiohttp.ClientSession(url) as session:
            clients = [_client(session, seed, num_requests, tally, half_way) for seed in range(NUM_CLIENTS)]
            await asyncio.gather(*clients, _kill(session, scenario, tally, half_way))
    return tally.fields(scenario.name)


async def _client(
    session: aiohttp.ClientSession, seed: int, num_requests: int, tally: Tally, half_way: asyncio.Event
) -> None:
    """Ask one thing after another; the first client to be half way says so."""
    rng = random.Random(seed)
    for number in range(num_requests):
        if 2 * number >= num_requests:
            half_way.set()
        prompt = [rng.randrange(1, 256) for _ in range(rng.randrange(20, 400))]
        end, pause = await _ask(session, prompt, rng.randrange(5, 60), tally)
        tally.ends[end] += 1
        tally.pauses.append(pause)


async def _ask(session: aiohttp.ClientSession, prompt: list[int], num_tokens: int, tally: Tally) -> tuple[str, float]:
    """One stream: how it ended ("identical" if all is well), and its longest pause between tokens (s)."""
    body = {
        "model": "scripted",
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    while True:
        async with session.post("/v1/completions", json=body) as response:
            if response.status == 200:
                tally.unsplit += response.headers["x-diptych-route"].startswith("local")
                token_ids, pause, error = await _read(response)
                break
            if response.status != 503 or "retry-after" not in response.headers:
                return f"HTTP {response.status}", 0.0
            tally.refusals += 1
            wait = float(response.headers["retry-after"])
        await asyncio.sleep(wait)
    if error is None:
        error = "identical" if token_ids == expected_tokens(prompt, num_tokens) else "other tokens"
    return error, pause


async def _read(response: aiohttp.ClientResponse) -> tuple[list[int], float, str | None]:
    """Tokens, the longest pause between two of them (s), and the code of the error that ended it, if any."""
    token_ids: list[int] = []
    times: list[float] = []
    error: str | None = None
    async for line in response.content:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            error = str(event["error"]["code"])
            break
        times.append(time.monotonic())
        token_ids += [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
    return token_ids, max((b - a for a, b in zip(times, times[1:], strict=False)), default=0.0), error


async def _kill(session: aiohttp.ClientSession, scenario: Scenario, tally: Tally, half_way: asyncio.Event) -> None:
    """SIGKILL the scenario's workers, and for as long as it says all that come back."""
    await half_way.wait()
    until = time.monotonic() + scenario.outage
    while True:
        async with session.get("/fleet") as response:
            workers = (await response.json())["workers"]
        victims = [worker for worker in workers if worker["role"] in scenario.roles and worker["state"] == "ready"]
        for worker in victims if scenario.everyone else victims[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker["pid"], signal.SIGKILL)
                tally.killed += 1
        if time.monotonic() >= until:
            return
        await asyncio.sleep(LOOK_EVERY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--requests", type=int, default=100, help="of each client")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.scenarios) - set(SCENARIOS):
        parser.error(f"unknown scenario {unknown.pop()}")
    chosen = [SCENARIOS[name] for name in arguments.scenarios or SCENARIOS]
    rows = [asyncio.run(measure(scenario, arguments.requests)) for scenario in chosen]
    for row in rows:
        print(
            f"{row['scenario']:<12} {row['workers_killed']} killed: {row['identical']} of {row['requests']} answers "
            f"identical, failures {row['failures'] or 'none'}, {row['refusals']} refusals, {row['unsplit']} un-split, "
            f"longest pause p99 {row['p99_longest_pause_ms']} ms, max {row['max_longest_pause_ms']} ms"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
