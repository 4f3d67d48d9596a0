"""What raced prefill gains and costs: time to first token of prompts that one worker, or two, prefill.

    python -m diptych.bench.races [--json FILE]

Four streams at a time over two prefill and two decode workers with the scripted engine: with all of them well, and
while a prefill worker stands still (SIGSTOP), which nobody notices for five seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp

from diptych.bench.metrics import distribution
from diptych.bench.pauses import token_times, until_all_are_back, workers
from diptych.bench.server import HOST, free_port, running
from diptych.bench.survival import FLAGS

STREAMS, PROMPT_TOKENS, ROUNDS, FROZEN_ROUNDS = 4, 1000, 8, 2
VICTIM = "prefill-0"


async def measure(rounds: int = ROUNDS, frozen_rounds: int = FROZEN_ROUNDS) -> list[dict[str, Any]]:
    """One row for each case. What is compared takes turns, so that the machine's moods are everybody's."""
    port = free_port()
    url = f"http://{HOST}:{port}"
    cases = [(race, frozen) for frozen in (False, True) for race in (1, 2)]
    found: dict[tuple[int, bool], list[float]] = {case: [] for case in cases}
    with running((sys.executable, "-m", "diptych", "serve", "--port", str(port), *FLAGS), url):
        async with aiohttp.ClientSession(url) as session:
            for number in range(rounds):
                for race, frozen in cases:
                    if not frozen:
                        found[race, frozen] += await _first_tokens(session, race, f"{number} {race}")
                    elif number < frozen_rounds:
                        found[race, frozen] += await _with_frozen_worker(session, race, f"frozen {number} {race}")
    return [
        {"race": race, "worker_frozen": frozen} | distribution("ttft", seconds)
        for (race, frozen), seconds in found.items()
    ]


async def _with_frozen_worker(session: aiohttp.ClientSession, race: int, seed: str) -> list[float]:
    pids = {worker["id"]: worker["pid"] for worker in await workers(session)}
    os.kill(pids[VICTIM], signal.SIGSTOP)
    seconds = await _first_tokens(session, race, seed)
    while True:  # until it has been found silent, and killed
        if all(worker["pid"] != pids[VICTIM] for worker in await workers(session)):
            break
        await asyncio.sleep(0.1)
    await until_all_are_back(session)
    return seconds


async def _first_tokens(session: aiohttp.ClientSession, race: int, seed: str) -> list[float]:
    headers = {"x-diptych-race": str(race), "x-diptych-prefer": "split"}
    streams = [token_times(session, f"{seed} {stream}", PROMPT_TOKENS, headers) for stream in range(STREAMS)]
    return [times[0] for times in await asyncio.gather(*streams)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = asyncio.run(measure())
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
