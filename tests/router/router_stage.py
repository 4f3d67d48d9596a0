"""A router over in-memory channels: the test plays the workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from diptych.core.clock import VirtualClock
from diptych.core.fleet import KVEndpoint, Manifest, ModelInfo, Role
from diptych.core.kv_layout import KVLayout
from diptych.core.request import FinishReason, Request, SampledToken, TokenOutput
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.recovery import RecoverySettings
from diptych.policy.routing import Routing
from diptych.router.dispatch import FleetCallbacks, Router
from diptych.telemetry.journal import NoJournal
from diptych.wire import messages
from diptych.wire.channel import MemoryChannel, memory_pair

MODEL = ModelInfo(name="m", digest="d", vocab_size=256, max_model_len=1024, eos_token_ids=())
LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, dtype="uint8", block_size=16)
LONG = Request(request_id="r", prompt_token_ids=tuple(range(200)))


def manifest(**changes: Any) -> Manifest:
    endpoint = KVEndpoint(transport="shm", address="unix:/nowhere")
    return Manifest(**{"model": MODEL, "layout": LAYOUT, "num_blocks": 64, "endpoints": (endpoint,), **changes})


def hello(name: str, role: Role, epoch: int = 1, **changes: Any) -> messages.Hello:
    return messages.Hello(messages.WIRE_VERSION, name, epoch, 42, role, manifest(**changes))


class Stage:
    """A router, and the workers' ends of its channels."""

    def __init__(self, recovery: RecoverySettings | None = None) -> None:
        self.clock = VirtualClock()
        self.silent: list[str] = []
        callbacks = FleetCallbacks(on_silent=self.silent.append)
        expected = {"p0": Role.PREFILL, "d0": Role.DECODE}
        self.policy = RouterPolicy(Routing(), recovery=recovery)
        self.router = Router(self.policy, self.clock, NoJournal(), expected=expected, callbacks=callbacks)
        self.tasks: list[asyncio.Task[None]] = []

    def connect(self) -> MemoryChannel[Any]:
        ours, theirs = memory_pair(messages.FromWorker, messages.ToWorker)
        self.tasks.append(asyncio.create_task(self.router.on_channel(ours)))
        return theirs

    def states(self) -> dict[str, str]:
        return {view.worker_id: view.state for view in self.router.workers()}

    async def join(self, greeting: messages.Hello) -> MemoryChannel[Any]:
        end = self.connect()
        end.send(greeting)
        assert isinstance(await anext(end), messages.Welcome)
        return end

    async def pair(self) -> tuple[MemoryChannel[Any], MemoryChannel[Any]]:
        prefill = await self.join(hello("p0", Role.PREFILL))
        decode = await self.join(hello("d0", Role.DECODE))
        assert await anext(prefill) == messages.WarmUp("d0", 1, manifest().endpoints[0])
        return prefill, decode


def play(script: Callable[[Stage], Awaitable[None]], recovery: RecoverySettings | None = None) -> None:
    async def run() -> None:
        stage = Stage(recovery)
        async with asyncio.timeout(30):
            await script(stage)
        for task in stage.tasks:
            task.cancel()
        await asyncio.gather(*stage.tasks, return_exceptions=True)

    asyncio.run(run())


def output(index: int, finish: FinishReason | None = None) -> TokenOutput:
    return TokenOutput("r", index, SampledToken(100 + index), finish)


async def start_split(stage: Stage) -> tuple[MemoryChannel[Any], MemoryChannel[Any], Any]:
    prefill, decode = await stage.pair()
    stream = stage.router.submit(LONG)
    assert await anext(decode) == messages.Reserve(LONG, ())
    decode.send(messages.Granted("r", b"ticket", 0))
    order = await anext(prefill)
    assert order == messages.Prefill(LONG, (), b"ticket", manifest().endpoints[0])
    return prefill, decode, stream


def attempt(number: int) -> Request:
    return replace(LONG, request_id=f"r~{number}")


def renamed(token: TokenOutput, request_id: str) -> TokenOutput:
    return replace(token, request_id=request_id)


async def confirm_canary(end: MemoryChannel[Any]) -> None:
    """A worker that has died gets one token to make before it gets anything else."""
    probe = await anext(end)
    assert probe.request.request_id.startswith("canary~")
    token = TokenOutput(probe.request.request_id, 0, SampledToken(1), FinishReason.LENGTH)
    end.send(messages.Prefilled(token, 0, 0.0, 0.0))


async def until(happened: Callable[[], bool]) -> None:
    """Let the loop go on until it has happened, for which there is no event."""
    async with asyncio.timeout(10):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0)
