"""Too much load, greedy tenants, slow and stubborn clients: what the others notice of them.

    python -m diptych.bench.overload [--seconds 8] [--json FILE]

The engine is the scripted one, whose steps take a modelled time, so that capacity is a property of the system and
not of the machine's arithmetic. Every figure that counts is a ratio of two loads on the same server in one run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diptych.bench.load import Exchange, LoadClient, LoadRequest, clock, completion_request, outcome_of
from diptych.bench.metrics import Fields, poisson_arrivals, random_prompts
from diptych.bench.server import HOST, RunningServer, free_port, running

FLAGS = ("--engine", "scripted", "--prefill", "1", "--decode", "1", "--max-queue-seconds", "1", "--api-key", "one")
MODEL = "scripted"
VOCAB_SIZE = 256
PROMPT, OUTPUT = 300, 16  # tokens of an ordinary request
LONG_PROMPT = 2000  # of a noisy neighbour's
SLO_TTFT = 2.5  # seconds
RETRIES = 10
SLOW_CONNECTIONS = 1000
TENANTS = """
[[tenant]]
name = "victim"
keys = ["victim"]

[[tenant]]
name = "noisy"
keys = ["noisy"]
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What became of one load. Times in seconds; `ttfts` are those of whole answers by when they were due."""

    seconds: float
    ends: Counter[str]
    ttfts: list[tuple[float, float]]
    unexplained: int  # refusals without Retry-After

    @property
    def goodput(self) -> float:
        """Whole answers per second whose first token came in time."""
        return sum(ttft <= SLO_TTFT for _, ttft in self.ttfts) / self.seconds

    def ttft(self, percentile: float) -> float:
        values = sorted(ttft for _, ttft in self.ttfts)
        return values[math.ceil(percentile / 100 * len(values)) - 1] if values else math.nan

    def fields(self) -> Fields:
        return {
            "goodput_per_second": round(self.goodput, 2),
            "ends": dict(self.ends),
            "refusals_without_retry_after": self.unexplained,
            "p50_ttft_ms": round(1e3 * self.ttft(50), 1),
            "p99_ttft_ms": round(1e3 * self.ttft(99), 1),
        }


def judge(exchanges: Sequence[Exchange], seconds: float) -> Load:
    """Sum up what came back from one load."""
    ends: Counter[str] = Counter()
    ttfts = []
    unexplained = 0
    for exchange in exchanges:
        outcome = outcome_of(exchange)
        ends[outcome.failure or "answered"] += 1
        if outcome.failure is None and outcome.timeline.ttft is not None:
            ttfts.append((exchange.due, outcome.timeline.ttft))
        refused = (outcome.failure or "").startswith(("HTTP 429", "HTTP 503"))
        unexplained += refused and "retry-after" not in exchange.headers
    return Load(seconds, ends, sorted(ttfts), unexplained)


@dataclass(slots=True)
class Requests:
    """An endless supply of requests that share no prefix."""

    seed: int = 0
    _made: dict[tuple[int, int], list[LoadRequest]] = field(default_factory=dict)

    def take(self, count: int, num_prompt_tokens: int = PROMPT, num_output_tokens: int = OUTPUT) -> list[LoadRequest]:
        self.seed += 1
        prompts = random_prompts(count, num_prompt_tokens, VOCAB_SIZE, self.seed)
        return [completion_request(MODEL, [token or 1 for token in prompt], num_output_tokens) for prompt in prompts]


async def offer(client: LoadClient, requests: Requests, rate: float, seconds: float, **sizes: int) -> Load:
    """An open loop of ordinary requests at `rate` per second."""
    count = max(1, round(rate * seconds))
    arrivals = poisson_arrivals(rate, count, seed=count)
    return judge(await client.offer(requests.take(count, **sizes), arrivals), seconds)


async def measure_capacity(client: LoadClient, requests: Requests, seconds: float) -> float:
    """Answers per second while a dozen clients ask one thing after another."""
    supply = iter(requests.take(int(100 * seconds)))
    deadline = clock() + seconds

    async def ask() -> int:
        answered = 0
        while clock() < deadline:
            exchange = Exchange(next(supply), clock())
            await client.send(exchange)
            if outcome_of(exchange).failure is None:
                answered += 1
            else:
                await asyncio.sleep(0.2)
        return answered

    return sum(await asyncio.gather(*(ask() for _ in range(12)))) / seconds


async def measure_overload(server: RunningServer, seconds: float) -> Fields:
    """1, 2 and 5 times what can be served, and how soon it is over when it is over."""
    requests = Requests()
    async with LoadClient(server.url, "one") as client:
        await client.send_all(requests.take(8))
        capacity = await measure_capacity(client, requests, seconds)
        calm = await offer(client, requests, 0.5 * capacity, seconds)
        loads = {f"{factor}x": await offer(client, requests, factor * capacity, seconds) for factor in (1, 2, 5)}
        until_normal = await _time_to_normal(client, requests, 0.5 * capacity, calm)
        storm = await _retry_storm(client, requests, server, 3 * capacity, seconds)
        until_normal_again = await _time_to_normal(client, requests, 0.5 * capacity, calm)
    peak = max(load.goodput for load in loads.values())
    return {
        "capacity_per_second": round(capacity, 2),
        "calm": calm.fields(),
        "loads": {name: load.fields() for name, load in loads.items()},
        "goodput_at_5x_of_peak": round(loads["5x"].goodput / peak, 3),
        "refusals_without_retry_after": sum(load.unexplained for load in loads.values()),
        "seconds_to_normal": until_normal,
        "retry_storm": storm | {"goodput_of_peak": round(storm["goodput_per_second"] / peak, 3)},
        "seconds_to_normal_after_storm": until_normal_again,
    }


async def _time_to_normal(client: LoadClient, requests: Requests, rate: float, calm: Load) -> float:
    """Seconds after the end of an overload until every further request is answered about as soon as before it."""
    start = clock()
    count = round(rate * 12)
    exchanges = await client.offer(requests.take(count), poisson_arrivals(rate, count, seed=7))
    load = judge(exchanges, 12)
    normal = 1.5 * calm.ttft(99)
    late = [due for due, ttft in load.ttfts if ttft > normal]
    failed = [exchange.due for exchange in exchanges if outcome_of(exchange).failure is not None]
    return round(max((due - start for due in late + failed), default=0.0), 2)


async def _retry_storm(
    client: LoadClient, requests: Requests, server: RunningServer, rate: float, seconds: float
) -> Fields:
    """Clients that take no for an invitation: each tries again at once, up to ten times."""
    count = round(rate * seconds)
    tries: list[Exchange] = []
    start, cpu_before = clock(), _front_cpu(server)

    async def insist(request: LoadRequest, arrival: float) -> None:
        await asyncio.sleep(start + arrival - clock())
        for _ in range(1 + RETRIES):
            exchange = Exchange(request, clock())
            await client.send(exchange)
            tries.append(exchange)
            if not (exchange.failure or "").startswith(("HTTP 429", "HTTP 503")):
                return

    arrivals = poisson_arrivals(rate, count, seed=3)
    await asyncio.gather(*map(insist, requests.take(count), arrivals))
    load = judge(tries, clock() - start)
    refusals = load.ends.total() - load.ends["answered"]
    return load.fields() | {
        "tries_per_request": round(len(tries) / count, 2),
        "front_cpu_ms_per_try": round(1e3 * (_front_cpu(server) - cpu_before) / max(1, len(tries)), 3),
        "refusals_per_second": round(refusals / load.seconds, 1),
    }


def _front_cpu(server: RunningServer) -> float:
    return server.processes()[server.pid].cpu_seconds


async def measure_slow_loris(server: RunningServer, seconds: float) -> Fields:
    """Ordinary load alone, and beside a thousand connections that send a byte a second; in turns."""
    requests = Requests(seed=1000)
    async with LoadClient(server.url, "one") as client:
        await client.send_all(requests.take(8))
        capacity = await measure_capacity(client, requests, seconds / 2)
        alone = [await offer(client, requests, 0.4 * capacity, seconds)]
        async with _slow_connections(server.url) as closed:
            beside = await offer(client, requests, 0.4 * capacity, seconds + 24)
            num_closed = closed()
        alone.append(await offer(client, requests, 0.4 * capacity, seconds))
    p99 = max(load.ttft(99) for load in alone)
    return {
        "connections": SLOW_CONNECTIONS,
        "closed_by_the_server": num_closed,
        "alone": [load.fields() for load in alone],
        "beside_them": beside.fields(),
        "p99_ttft_ratio": round(beside.ttft(99) / p99, 2),
    }


@contextlib.asynccontextmanager
async def _slow_connections(url: str) -> AsyncIterator[object]:
    """Half of them never finish their head, half their body. Yields a function: how many were closed."""
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer one\r\n"
    body = head + b"content-type: application/json\r\ncontent-length: 100000\r\n\r\n"
    num_closed = 0

    async def drip(number: int) -> None:
        nonlocal num_closed
        await asyncio.sleep(number / SLOW_CONNECTIONS)
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head if number % 2 else body)
            while not reader.at_eof():
                writer.write(b" " if number % 2 == 0 else b"x")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1), 1.0)
            writer.close()
        except OSError:
            pass
        num_closed += 1

    tasks = [asyncio.create_task(drip(number)) for number in range(SLOW_CONNECTIONS)]
    try:
        yield lambda: num_closed
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure_noisy_neighbour(server: RunningServer, seconds: float, keys: tuple[str, str]) -> Fields:
    """A light tenant alone, and beside one that floods the server with long prompts for single tokens."""
    requests = Requests(seed=2000)
    async with LoadClient(server.url, keys[0]) as victim, LoadClient(server.url, keys[1]) as noisy:
        await victim.send_all(requests.take(8))
        capacity = await measure_capacity(victim, requests, seconds / 2)
        rate = 0.2 * capacity
        alone = await offer(victim, requests, rate, seconds)
        flood = asyncio.create_task(
            offer(noisy, requests, 2 * capacity * PROMPT / LONG_PROMPT, seconds + 4,
                  num_prompt_tokens=LONG_PROMPT, num_output_tokens=1)
        )  # fmt: skip
        await asyncio.sleep(2)
        beside = await offer(victim, requests, rate, seconds)
        greedy = await flood
    return {
        "victim_alone": alone.fields(),
        "victim_beside_it": beside.fields(),
        "noisy": greedy.fields(),
        "p50_ttft_ratio": round(beside.ttft(50) / alone.ttft(50), 2),
        "p99_ttft_ratio": round(beside.ttft(99) / alone.ttft(99), 2),
        "victim_answered": round(beside.ends["answered"] / beside.ends.total(), 3),
    }


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[RunningServer]:
    port = free_port()
    command = (sys.executable, "-m", "diptych", "serve", "--port", str(port), *FLAGS, *flags)
    with running(command, f"http://{HOST}:{port}") as server:
        yield server


def measure_all(seconds: float) -> Fields:
    """Everything, each part on a server of its own but its comparisons on the same one."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "tenants.toml"
        file.write_text(TENANTS)
        with serving() as server:
            overload = asyncio.run(measure_overload(server, seconds))
        with serving() as server:
            loris = asyncio.run(measure_slow_loris(server, seconds))
        with serving("--tenants", str(file)) as server:
            apart = asyncio.run(measure_noisy_neighbour(server, seconds, ("victim", "noisy")))
            together = asyncio.run(measure_noisy_neighbour(server, seconds, ("noisy", "noisy")))
    return {
        "overload": overload,
        "slow_loris": loris,
        "noisy_neighbour": {"as two tenants": apart, "as one tenant": together},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="of each load")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = measure_all(arguments.seconds)
    print(json.dumps(figures, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
