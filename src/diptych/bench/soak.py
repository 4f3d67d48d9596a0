"""Mixed load for a long time: what grows that should not, and what is lost that should not be.

    python -m diptych.bench.soak --minutes 20 [--engine scripted|torch] [--json FILE]

Two prefill and two decode workers. Every prompt is new, so caches fill and evict; answers are streamed or not, split
or not; some clients leave in the middle; the second worker of either role is killed now and then, while the router and
the first ones live from beginning to end, so that their memory can be fitted with a line. With the scripted engine
every answer is compared with the right one.

Descriptors, threads and KV blocks are looked at when nothing is going on: after the warm-up, and at the end.
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
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from diptych.bench import processes
from diptych.bench.faults.fleet import Fleet, Violation, is_idle
from diptych.bench.processes import Footprint
from diptych.engine.scripted import expected_tokens

FLAGS = ("--prefill", "2", "--decode", "2")
MORTAL = ("prefill-1", "decode-1")  # the others, and the router, live from beginning to end
NUM_CLIENTS = 12
WARM_UP_SHARE, SHORTEST_WARM_UP = 0.15, 30.0  # of the duration; seconds
SAMPLE_SECONDS = 2.0
LEAVING_SHARE = 0.15  # of clients, in the middle
IDLE_SECONDS = 60.0
TOP_TOKEN = 200  # prompts are random token ids below this, which every model has
NOT_FAILED = ("exact", "answered", "left")


@dataclass(frozen=True, slots=True)
class Request:
    """What one client wants, and after how many tokens it leaves (None: it stays)."""

    prompt: list[int]
    max_tokens: int
    stream: bool
    prefer: str | None
    leaves_after: int | None

    @classmethod
    def draw(cls, chance: random.Random) -> Request:
        max_tokens = chance.randrange(5, 60)
        leaves = chance.random() < LEAVING_SHARE
        return cls(
            prompt=[chance.randrange(1, TOP_TOKEN) for _ in range(chance.randrange(20, 400))],
            max_tokens=max_tokens,
            stream=leaves or chance.random() < 0.7,
            prefer=chance.choice((None, "split", "local")),
            leaves_after=chance.randrange(max_tokens) if leaves else None,
        )


@dataclass(slots=True)
class Measured:
    """What was seen. Samples are (seconds since the begin, what a process held then)."""

    ends: Counter[str] = field(default_factory=Counter)
    latencies: list[tuple[float, float]] = field(default_factory=list)  # (when it ended, seconds until its end)
    samples: dict[str, list[tuple[float, Footprint]]] = field(default_factory=dict)
    kills: int = 0
    idle: list[dict[str, Footprint]] = field(default_factory=list)  # after the warm-up, and at the end


class Soak:
    """One run."""

    def __init__(self, fleet: Fleet, seconds: float, kill_every: float, seed: int) -> None:
        self._fleet = fleet
        self._seconds = seconds
        self._kill_every = kill_every
        self._seed = seed
        self._began = 0.0
        self._model = ""
        self.measured = Measured()

    async def run(self) -> None:
        """Raises Violation if the fleet does not become idle, or ends badly."""
        self._began = time.monotonic()
        async with self._fleet.session.get("/v1/models") as response:
            self._model = (await response.json())["data"][0]["id"]
        warm_up = max(SHORTEST_WARM_UP, WARM_UP_SHARE * self._seconds)
        await self._load_for(warm_up, 0)
        await self._note_idle()
        await self._load_for(max(0.0, self._seconds - warm_up), 1)
        await self._note_idle()

    async def _load_for(self, seconds: float, part: int) -> None:
        stop = asyncio.Event()
        clients = [self._client(random.Random(f"{self._seed} {part} {i}"), stop) for i in range(NUM_CLIENTS)]
        others = [asyncio.create_task(work) for work in (self._watch(), self._kill_now_and_then())]
        serving = asyncio.gather(*clients)
        await asyncio.sleep(seconds)
        stop.set()
        await serving
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _client(self, chance: random.Random, stop: asyncio.Event) -> None:
        while not stop.is_set():
            request = Request.draw(chance)
            sent = time.monotonic()
            try:
                end = await self._ask(request)
            except (aiohttp.ClientError, TimeoutError) as error:
                end = type(error).__name__
            self.measured.ends[end] += 1
            if end in ("exact", "answered"):
                now = time.monotonic()
                self.measured.latencies.append((now - self._began, now - sent))

    async def _ask(self, request: Request) -> str:
        """How it ended: "exact" ("answered", where the right answer is not known), "left", or what was wrong."""
        body = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": request.stream,
            "return_token_ids": True,
        }
        headers = {} if request.prefer is None else {"x-diptych-prefer": request.prefer}
        async with self._fleet.session.post("/v1/completions", json=body, headers=headers) as response:
            if response.status != 200:
                return f"HTTP {response.status}"
            if not request.stream:
                return self._judge(request, (await response.json())["choices"][0]["token_ids"])
            token_ids: list[int] = []
            async for line in response.content:
                if request.leaves_after is not None and len(token_ids) >= request.leaves_after:
                    return "left"
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        return str(event["error"]["code"])
                    token_ids += [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
            return self._judge(request, token_ids)

    def _judge(self, request: Request, token_ids: list[int]) -> str:
        if len(token_ids) != request.max_tokens:
            return "too few tokens"
        if self._fleet.engine != "scripted":
            return "answered"
        return "exact" if token_ids == expected_tokens(request.prompt, request.max_tokens) else "WRONG TOKENS"

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            now = time.monotonic() - self._began
            for name, held in (await self._footprints()).items():
                self.measured.samples.setdefault(name, []).append((now, held))

    async def _footprints(self) -> dict[str, Footprint]:
        """Of those that live from beginning to end."""
        pids = {"router": self._fleet.pid}
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            workers = await self._fleet.workers()
            pids |= {name: worker["pid"] for name, worker in workers.items() if name not in MORTAL}
        held = {name: processes.footprint(pid) for name, pid in pids.items()}
        return {name: footprint for name, footprint in held.items() if footprint is not None}

    async def _kill_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self._kill_every)
            workers = await self._fleet.workers()
            victim = workers[MORTAL[self.measured.kills % len(MORTAL)]]
            if victim["state"] == "ready":
                self._fleet.look()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim["pid"], signal.SIGKILL)
                self.measured.kills += 1

    async def _note_idle(self) -> None:
        everybody = {"prefill-0", "decode-0", *MORTAL}

        def at_rest(workers: dict[str, dict[str, Any]]) -> bool:
            return is_idle(workers) and {name for name in workers if workers[name]["state"] == "ready"} == everybody

        await self._fleet.until_workers(at_rest, "all workers are there, and no KV block is in use", IDLE_SECONDS)
        self.measured.idle.append(await self._footprints())


def report(measured: Measured, seconds: float) -> dict[str, Any]:
    """The figures, as they are written to JSON. The first idle moment is the end of the warm-up."""
    warm_up = max(SHORTEST_WARM_UP, WARM_UP_SHARE * seconds)
    before, after = measured.idle
    return {
        "seconds": round(seconds),
        "requests": measured.ends.total(),
        "ends": dict(measured.ends),
        "failed": sum(count for end, count in measured.ends.items() if end not in NOT_FAILED),
        "workers_killed": measured.kills,
        "leaked_blocks": 0,  # the run raises Violation unless no block is in use in the end
        "processes": {
            name: {
                **memory_slope([(at, held.megabytes) for at, held in samples if at > warm_up]),
                "leaked_descriptors": after[name].descriptors - before[name].descriptors,
                "leaked_threads": after[name].threads - before[name].threads,
            }
            for name, samples in sorted(measured.samples.items())
        },
        **latency_drift([latency for latency in measured.latencies if latency[0] > warm_up]),
    }


def memory_slope(samples: list[tuple[float, float]]) -> dict[str, float]:
    """A least-squares line through (seconds, MB): MB per hour with its standard error, first and last MB."""
    times, megabytes = (np.array(column) for column in zip(*samples, strict=True))
    (slope, _), covariance = np.polyfit(times / 3600, megabytes, 1, cov=True)
    return {
        "mb_per_hour": round(float(slope), 2),
        "standard_error": round(float(np.sqrt(covariance[0, 0])), 2),
        "mb_first": round(float(megabytes[0]), 1),
        "mb_last": round(float(megabytes[-1]), 1),
    }


def latency_drift(latencies: list[tuple[float, float]]) -> dict[str, float]:
    """p99 seconds until the end of an answer, in the first and in the last third of the time."""
    times = [at for at, _ in latencies]
    third = (max(times) - min(times)) / 3
    first = [seconds for at, seconds in latencies if at <= min(times) + third]
    last = [seconds for at, seconds in latencies if at >= max(times) - third]
    return {
        f"p99_{name}": round(float(np.quantile(part, 0.99)), 3) for name, part in (("first", first), ("last", last))
    }


def table(fields: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{fields['requests']} requests in {fields['seconds']} s, {fields['failed']} failed ({fields['ends']}), "
        f"{fields['workers_killed']} workers killed, {fields['leaked_blocks']} KV blocks leaked",
        f"p99 of an answer {fields['p99_first']:.2f} s in the first third, {fields['p99_last']:.2f} s in the last",
        f"{'process':<12}{'MB/h':>8}{'+-':>8}{'MB':>8}{'to':>8}{'fds':>6}{'threads':>9}",
    ]
    for name, row in fields["processes"].items():
        lines.append(
            f"{name:<12}{row['mb_per_hour']:>8.2f}{row['standard_error']:>8.2f}{row['mb_first']:>8.1f}"
            f"{row['mb_last']:>8.1f}{row['leaked_descriptors']:>+6}{row['leaked_threads']:>+9}"
        )
    return "\n".join(lines)


async def measure(directory: Path, seconds: float, kill_every: float, engine: str = "scripted") -> dict[str, Any]:
    """Run once. Raises Violation if blocks, processes or files are left."""
    fleet = Fleet(directory, FLAGS, engine=engine)
    soak = Soak(fleet, seconds, kill_every, seed=7)
    async with fleet.running():
        await fleet.start()
        await soak.run()
    return report(soak.measured, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--engine", choices=("scripted", "torch"), default="scripted")
    parser.add_argument("--kill-every", type=float, default=45.0, help="seconds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        run = measure(Path(name) / "fleet", 60 * arguments.minutes, arguments.kill_every, arguments.engine)
        try:
            fields = asyncio.run(run)
        except Violation as error:
            sys.exit(f"violated: {error}")
    print(table(fields))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(fields, indent=2) + "\n")


if __name__ == "__main__":
    main()
