"""How much of a hand-off is hidden behind the prefill.

    python -m diptych.bench.overlap --out benchmarks

One prefill worker and, for each transport, one decode worker, all of them the processes that serve; this
program stands in for the router and sends prompts, one at a time, over each transport in turn. Writes
overlap.json, overlap.md and overlap.png.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diptych.bench import overlap_worker
from diptych.bench.metrics import Fields
from diptych.bench.overlap_report import markdown, summarize
from diptych.bench.report import fingerprint
from diptych.core.fleet import Role, WorkerId
from diptych.core.request import Request, SamplingParams
from diptych.core.settings import CacheSettings, EngineSettings, WorkerSettings
from diptych.fleet.local import thread_environment
from diptych.fleet.placement import place
from diptych.wire import messages
from diptych.wire.channel import StreamChannel, listen

PREFILL = "prefill"
DECODE_TOKENS = 6
TIMEOUT_SECONDS = 120.0
# KV as heavy as half of an 8B model's: 2 KiB per token and layer.
CHECKPOINT = {"head_dim": 128, "num_key_value_heads": 4}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: every length over every transport, `rounds` times."""

    engine: str = "torch"
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    transports: tuple[str, ...] = ("shm", "tcp")
    rounds: int = 5

    @property
    def max_model_len(self) -> int:
        return max(self.lengths) + 16


FULL = Plan()


class Conductor:
    """Stands in for the router: takes workers' messages in and sends one request at a time through a pair."""

    def __init__(self) -> None:
        self._channels: dict[WorkerId, StreamChannel[Any]] = {}
        self._hellos: dict[WorkerId, messages.Hello] = {}
        self._answers: asyncio.Queue[Any] = asyncio.Queue()

    async def on_channel(self, channel: StreamChannel[Any]) -> None:
        """One worker's messages, until it ends."""
        async for message in channel:
            match message:
                case messages.Hello():
                    self._channels[message.worker_id] = channel
                    self._hellos[message.worker_id] = message
                    channel.send(messages.Welcome(messages.WIRE_VERSION))
                    self._answers.put_nowait(message)
                case messages.Granted() | messages.Tokens() | messages.Failed():
                    self._answers.put_nowait(message)

    async def joined(self, num_workers: int) -> None:
        """Wait for all workers, and connect them."""
        for _ in range(num_workers):
            await self._answer(messages.Hello)
        for worker_id, hello in self._hellos.items():
            if worker_id != PREFILL:
                [endpoint] = hello.manifest.endpoints
                self._channels[PREFILL].send(messages.WarmUp(worker_id, hello.epoch, endpoint))

    async def serve(self, request: Request, decode: WorkerId) -> None:
        """Prefill, hand over, decode to the end."""
        self._channels[decode].send(messages.Reserve(request, ()))
        granted = await self._answer(messages.Granted)
        [endpoint] = self._hellos[decode].manifest.endpoints
        self._channels[PREFILL].send(messages.Prefill(request, (), granted.ticket, endpoint))
        while True:
            tokens = await self._answer(messages.Tokens)
            if tokens.outputs[-1].finish is not None:
                return

    async def _answer(self, kind: type[Any]) -> Any:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            answer = await self._answers.get()
        if not isinstance(answer, kind):
            raise RuntimeError(f"expected {kind.__name__}, a worker sent {answer}")
        return answer

    async def beat(self) -> None:
        """Show the workers that there is still somebody."""
        for number in itertools.count(1):
            await asyncio.sleep(1.0)
            for channel in self._channels.values():
                channel.send(messages.Ping(number))

    def end(self) -> None:
        for channel in self._channels.values():
            channel.send(messages.Shutdown())


def run(plan: Plan, directory: Path) -> list[Fields]:
    """Serve all prompts of `plan` and say what became of each (see `overlap_report.summarize`)."""
    if plan.engine == "torch":
        from diptych.bench.engine_bench import make_benchmark_checkpoint

        make_benchmark_checkpoint(directory / "model", max_position_embeddings=plan.max_model_len, **CHECKPOINT)
    served = asyncio.run(_serve_all(plan, directory))
    seen = {path.stem: json.loads(path.read_text()) for path in directory.glob("*.records")}
    return [summarize(request, seen[PREFILL], seen[request["transport"]]) for request in served]


async def _serve_all(plan: Plan, directory: Path) -> list[Fields]:
    """Each prompt twice: first it is computed, then it is already in the prefill worker's cache, so that all
    of it leaves at once: the transfer alone."""
    served = []
    async with _fleet(plan, directory) as conductor:
        for number, length, transport in _turns(plan):
            dice = random.Random(f"{number} {length} {transport}")
            prompt = tuple(dice.randrange(1, 256) for _ in range(length))
            sampling = SamplingParams(temperature=0.0, max_tokens=DECODE_TOKENS, ignore_eos=True)
            name = f"{length}-{transport}-{number}"
            cold = Request(request_id=name, prompt_token_ids=prompt, sampling=sampling)
            await conductor.serve(cold, transport)
            await conductor.serve(replace(cold, request_id=f"{name}-cached"), transport)
            if number:  # the first round warms up
                served.append({"request": name, "tokens": length, "transport": transport})
    return served


def _turns(plan: Plan) -> Iterator[tuple[int, int, str]]:
    for number in range(plan.rounds + 1):
        for length in plan.lengths:
            for transport in plan.transports[number % 2 :] + plan.transports[: number % 2]:
                yield number, length, transport


@contextlib.asynccontextmanager
async def _fleet(plan: Plan, directory: Path) -> AsyncIterator[Conductor]:
    """The workers' processes, connected. A decode worker keeps no prefixes, so that it is sent everything."""
    key = secrets.token_bytes(32)
    conductor = Conductor()
    listener = await listen(f"unix:{directory}/router.sock", key, conductor.on_channel, messages.FromWorker)
    prefill_cpu, decode_cpu = place((1, 1), sorted(os.sched_getaffinity(0)))
    common = WorkerSettings(
        worker_id=PREFILL,
        role=Role.PREFILL,
        epoch=1,
        router=listener.address,
        key=key,
        run_dir=str(directory),
        transports=(),
        engine=EngineSettings(kind=plan.engine, model=str(directory / "model"), max_model_len=plan.max_model_len),
        cache=CacheSettings(kv_tokens=plan.max_model_len),
        cpu=prefill_cpu,
    )
    cache = replace(common.cache, prefix_caching=False)
    decoders = [
        replace(common, worker_id=name, role=Role.DECODE, transports=(name,), cache=cache, cpu=decode_cpu)
        for name in plan.transports
    ]
    processes = [_start(settings, directory) for settings in (common, *decoders)]
    beating = asyncio.create_task(conductor.beat())
    try:
        await conductor.joined(len(processes))
        yield conductor
        conductor.end()
        for process in processes:
            await asyncio.to_thread(process.join)
    finally:
        beating.cancel()
        for process in processes:
            process.kill()
        await listener.close()


def _start(settings: WorkerSettings, directory: Path) -> Any:
    os.environ.update(thread_environment(settings.cpu.threads))  # a spawned process inherits it
    path = directory / f"{settings.worker_id}.records"
    process = multiprocessing.get_context("spawn").Process(target=overlap_worker.run, args=(settings, path))
    process.start()
    return process


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="directory for overlap.json, .md and .png")
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--max-tokens", type=int, default=max(FULL.lengths), help="leave longer prompts out")
    options = parser.parse_args(arguments)
    lengths = tuple(length for length in FULL.lengths if length <= options.max_tokens)
    machine = {**fingerprint("make bench-overlap"), "load_before": os.getloadavg()[0]}
    results: Fields = {"machine": machine}
    for engine in ("torch", "scripted"):
        with tempfile.TemporaryDirectory(prefix="diptych-bench-") as directory:
            results[engine] = run(Plan(engine=engine, lengths=lengths, rounds=options.rounds), Path(directory))
    _write(results, options.out)


def _write(results: Fields, out: Path) -> None:
    from diptych.bench.overlap_picture import draw_overlap

    out.mkdir(parents=True, exist_ok=True)
    draw_overlap(results["torch"], out / "overlap.png")
    report = markdown(results)
    (out / "overlap.md").write_text(report, encoding="utf-8")
    brief = {
        engine: [{name: run[name] for name in run if name not in ("chunks", "decodes")} for run in results[engine]]
        for engine in ("torch", "scripted")
    }
    (out / "overlap.json").write_text(json.dumps({**results, **brief}, indent=2) + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
