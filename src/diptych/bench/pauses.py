"""What each way to go on costs a stream: its longest pause when its workers leave or are killed in the middle.

    python -m diptych.bench.pauses [--json FILE]

One stream with a long prompt at a time, over two prefill and two decode workers with the scripted engine. A decode
worker that leaves hands the KV over; after a kill the prefill worker has the prompt's KV still; with both killed
prompt and answer so far are computed again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from diptych.bench.server import HOST, free_port, running
from diptych.bench.survival import FLAGS
from diptych.engine.scripted import expected_tokens

PROMPT_TOKENS, OUTPUT_TOKENS, STRIKE_AT = 3500, 200, 40
ROUNDS = 3
SETTLE_SECONDS = 3.0  # for canaries, once all workers are back


@dataclass(frozen=True, slots=True)
class Case:
    """What happens to which of the stream's two workers."""

    name: str
    roles: tuple[str, ...] = ()
    signum: signal.Signals = signal.SIGKILL


CASES = (
    Case("undisturbed"),
    Case("decode worker leaves", ("decode",), signal.SIGTERM),
    Case("decode worker killed", ("decode",)),
    Case("both killed", ("decode", "prefill")),
)


async def measure(cases: Sequence[Case] = CASES, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """The longest pause (ms) of each case, the median of so many rounds."""
    port = free_port()
    url = f"http://{HOST}:{port}"
    rows = []
    with running((sys.executable, "-m", "diptych", "serve", "--port", str(port), *FLAGS), url):
        async with aiohttp.ClientSession(url) as session:
            for case in cases:
                pauses = [await _longest_pause(session, case, number) for number in range(rounds)]
                rows.append({"case": case.name, "longest_pause_ms": round(1e3 * statistics.median(pauses), 1)})
    return rows


async def _longest_pause(session: aiohttp.ClientSession, case: Case, number: int) -> float:
    """Of one stream (s). Raises ValueError if its tokens are not the right ones."""
    rng = random.Random(f"{case.name} {number}")
    prompt = [rng.randrange(1, 256) for _ in range(PROMPT_TOKENS)]
    body = {"model": "scripted", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0}
    body |= {"stream": True, "return_token_ids": True}
    token_ids: list[int] = []
    times: list[float] = []
    async with session.post("/v1/completions", json=body, headers={"x-diptych-prefer": "split"}) as response:
        route = dict(part.split("=") for part in response.headers["x-diptych-route"].split(";"))
        async for line in response.content:
            if line.startswith(b"data: {"):
                times.append(time.monotonic())
                token_ids += json.loads(line.removeprefix(b"data: "))["choices"][0]["token_ids"]
                if len(times) == STRIKE_AT:
                    await _strike(session, case, route)
    if token_ids != expected_tokens(prompt, OUTPUT_TOKENS):
        raise ValueError(f"{case.name}: the answer has changed")
    if case.roles:
        await _until_all_are_back(session)
    return max(later - earlier for earlier, later in zip(times, times[1:], strict=False))


async def _until_all_are_back(session: aiohttp.ClientSession) -> None:
    while True:
        if all(worker["state"] == "ready" for worker in await _workers(session)):
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(SETTLE_SECONDS)


async def _strike(session: aiohttp.ClientSession, case: Case, route: dict[str, str]) -> None:
    pids = {worker["id"]: worker["pid"] for worker in await _workers(session)}
    for role in case.roles:
        os.kill(pids[route[role]], case.signum)


async def _workers(session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    async with session.get("/fleet") as response:
        workers: list[dict[str, Any]] = (await response.json())["workers"]
        return workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = asyncio.run(measure())
    for row in rows:
        print(f"{row['case']:<22} longest pause {row['longest_pause_ms']:>8} ms")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
