"""What each way to go on costs a stream: its longest pause when its workers leave or are killed in the middle.

    python -m diptych.bench.pauses [--json FILE]

One stream with a long prompt at a time, over two prefill and two decode workers with the scripted engine. A decode
worker that leaves hands the KV over; after a kill the prefill worker has the prompt's KV still; with both killed
prompt and answer so far are computed again, unless another worker has a copy (`policy.checkpoints`). What copies cost
is measured, too, in the same run: four streams at a time, with and without.
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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from diptych.bench.metrics import distribution
from diptych.bench.server import HOST, free_port, running
from diptych.bench.survival import FLAGS
from diptych.engine.scripted import expected_tokens

PROMPT_TOKENS, OUTPUT_TOKENS, STRIKE_AT = 3500, 200, 40
ROUNDS = 3
SETTLE_SECONDS = 1.0  # for canaries over new pairs


@dataclass(frozen=True, slots=True)
class Case:
    """What happens to which of the stream's two workers."""

    name: str
    roles: tuple[str, ...] = ()
    checkpoint_tokens: int = 0
    signum: signal.Signals = signal.SIGKILL


CASES = (
    Case("undisturbed"),
    Case("decode worker leaves", ("decode",), signum=signal.SIGTERM),
    Case("decode worker killed", ("decode",)),
    Case("decode worker killed, a copy every 32 tokens", ("decode",), 32),
    Case("both killed", ("decode", "prefill")),
    Case("both killed, a copy every 32 tokens", ("decode", "prefill"), 32),
)

PRICE_STREAMS, PRICE_PROMPT_TOKENS, PRICE_ROUNDS = 4, 1000, 6
PRICES = (0, 256, 64, 16)  # tokens between two copies; 0: none


@dataclass(slots=True)
class Price:
    """What copies every so many tokens cost: the gaps between tokens (s) of all streams, and what was copied."""

    checkpoint_tokens: int
    gaps: list[float] = field(default_factory=list)
    copies: float = 0.0
    copied_tokens: float = 0.0

    def fields(self) -> dict[str, Any]:
        return {
            "checkpoint_tokens": self.checkpoint_tokens,
            **distribution("itl", self.gaps),
            "copies_per_stream": round(self.copies / (PRICE_STREAMS * PRICE_ROUNDS), 1),
            "copied_tokens_per_stream": round(self.copied_tokens / (PRICE_STREAMS * PRICE_ROUNDS)),
        }


async def measure(
    cases: Sequence[Case] = CASES, rounds: int = ROUNDS, prices: Sequence[int] = PRICES
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The longest pause (ms) of each case, the median of so many rounds; and what copies cost."""
    port = free_port()
    url = f"http://{HOST}:{port}"
    rows = []
    with running((sys.executable, "-m", "diptych", "serve", "--port", str(port), *FLAGS), url):
        async with aiohttp.ClientSession(url) as session:
            found = await _prices(session, prices)  # first: workers that were killed are not trusted for a while
            for case in cases:
                pauses = [await _longest_pause(session, case, number) for number in range(rounds)]
                rows.append({"case": case.name, "longest_pause_ms": round(1e3 * statistics.median(pauses), 1)})
    return rows, found


async def _prices(session: aiohttp.ClientSession, prices: Sequence[int]) -> list[dict[str, Any]]:
    """What is compared takes turns, so that the machine's moods are everybody's."""
    measured = [Price(every) for every in prices]
    for number in range(PRICE_ROUNDS):
        for price in measured:
            before = await _copies(session)
            headers = {"x-diptych-checkpoint": str(price.checkpoint_tokens), "x-diptych-prefer": "split"}
            seeds = [f"{number} {price.checkpoint_tokens} {stream}" for stream in range(PRICE_STREAMS)]
            streams = [token_times(session, seed, PRICE_PROMPT_TOKENS, headers) for seed in seeds]
            for times in await asyncio.gather(*streams):
                price.gaps += _gaps(times)
            after = await _copies(session)
            price.copies += after[0] - before[0]
            price.copied_tokens += after[1] - before[1]
    return [price.fields() for price in measured]


async def _copies(session: aiohttp.ClientSession) -> tuple[float, float]:
    """Copies that the server has made so far, and tokens sent for them."""
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("diptych_router_checkpoint"))
    return float(values["diptych_router_checkpoints_total"]), float(values["diptych_router_checkpoint_tokens_total"])


async def _longest_pause(session: aiohttp.ClientSession, case: Case, number: int) -> float:
    """Of one stream (s)."""

    async def strike(route: dict[str, str]) -> None:
        await _strike(session, case, route)

    headers = {"x-diptych-checkpoint": str(case.checkpoint_tokens)}
    times = await token_times(session, f"{case.name} {number}", PROMPT_TOKENS, headers, strike)
    if case.roles:
        await until_all_are_back(session)
    return max(_gaps(times))


async def token_times(
    session: aiohttp.ClientSession,
    seed: str,
    num_prompt: int,
    headers: dict[str, str],
    strike: Callable[[dict[str, str]], Awaitable[None]] | None = None,
) -> list[float]:
    """When the tokens of one split stream came (s after it was sent); `strike` is told its route in the middle. Raises
    ValueError if its tokens are not the right ones, or if it was not split."""
    rng = random.Random(seed)
    prompt = [rng.randrange(1, 256) for _ in range(num_prompt)]
    body = {"model": "scripted", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0}
    body |= {"stream": True, "return_token_ids": True}
    token_ids: list[int] = []
    times: list[float] = []
    sent = time.monotonic()
    async with session.post("/v1/completions", json=body, headers=headers) as response:
        route = dict(part.split("=") for part in response.headers["x-diptych-route"].split(";"))
        if "prefill" not in route:
            raise ValueError(f"{seed}: the request was not split")
        async for line in response.content:
            if line.startswith(b"data: {"):
                times.append(time.monotonic() - sent)
                token_ids += json.loads(line.removeprefix(b"data: "))["choices"][0]["token_ids"]
                if len(times) == STRIKE_AT and strike is not None:
                    await strike(route)
    if token_ids != expected_tokens(prompt, OUTPUT_TOKENS):
        raise ValueError(f"{seed}: the answer has changed")
    return times


def _gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


async def until_all_are_back(session: aiohttp.ClientSession) -> None:
    """And trusted again: who was killed a few times in a minute is left alone for up to half of one."""
    while True:
        if await _all_are_ready(session) and await _all_are_trusted(session):
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(SETTLE_SECONDS)


async def _all_are_ready(session: aiohttp.ClientSession) -> bool:
    return all(worker["state"] == "ready" for worker in await workers(session))


async def _all_are_trusted(session: aiohttp.ClientSession) -> bool:
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    breakers = [line for line in lines if line.startswith(("diptych_worker_breaker{", "diptych_pair_breaker{"))]
    return not any(line.endswith(" 1.0") and 'state="closed"' not in line for line in breakers)


async def _strike(session: aiohttp.ClientSession, case: Case, route: dict[str, str]) -> None:
    pids = {worker["id"]: worker["pid"] for worker in await workers(session)}
    for role in case.roles:
        os.kill(pids[route[role]], case.signum)


async def workers(session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    async with session.get("/fleet") as response:
        views: list[dict[str, Any]] = (await response.json())["workers"]
        return views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, prices = asyncio.run(measure())
    for row in rows:
        print(f"{row['case']:<45} longest pause {row['longest_pause_ms']:>8} ms")
    for price in prices:
        print(", ".join(f"{name} {value}" for name, value in price.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"pauses": rows, "price_of_copies": prices}, indent=2) + "\n")


if __name__ == "__main__":
    main()
