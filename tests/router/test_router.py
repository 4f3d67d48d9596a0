"""The router's shell over in-memory channels: the test plays the workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from diptych.core.clock import VirtualClock
from diptych.core.errors import ServingError, UnavailableError
from diptych.core.fleet import KVEndpoint, Manifest, ModelInfo, Role, WorkerStats
from diptych.core.kv_layout import KVLayout
from diptych.core.request import FinishReason, Request, SampledToken, TokenOutput
from diptych.policy.dispatch import RouterPolicy
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

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.silent: list[str] = []
        callbacks = FleetCallbacks(on_silent=self.silent.append)
        expected = {"p0": Role.PREFILL, "d0": Role.DECODE}
        self.policy = RouterPolicy(Routing())
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


def play(script: Callable[[Stage], Awaitable[None]]) -> None:
    async def run() -> None:
        stage = Stage()
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


def test_a_split_request_from_submission_to_its_last_token() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, stream = await start_split(stage)
        decode.send(messages.Tokens([output(1)]))  # may overtake the first token, on another connection
        decode.send(messages.Tokens([output(1)]))  # a duplicate
        prefill.send(messages.Prefilled(output(0), 16, 0.5, 0.25))
        decode.send(messages.Tokens([output(2, FinishReason.LENGTH)]))
        tokens = [token.token.token_id async for token in stream]
        assert tokens == [100, 101, 102]
        assert stream.route.header() == "prefill=p0;decode=d0;transport=shm"
        assert stream.num_cached_tokens == 16
        assert stream.timeline.server_timing()["prefill"] == 0.25

    play(script)


@pytest.mark.fault(23)
def test_cancelling_aborts_in_both_pools() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, stream = await start_split(stage)
        stream.cancel()
        stream.cancel()
        assert await anext(prefill) == messages.Abort("r")
        assert await anext(decode) == messages.Abort("r")

    play(script)


def attempt(number: int) -> Request:
    return replace(LONG, request_id=f"r~{number}")


def renamed(token: TokenOutput, request_id: str) -> TokenOutput:
    return replace(token, request_id=request_id)


@pytest.mark.fault(32)
def test_a_lost_decode_worker_costs_a_pause_and_no_token() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, stream = await start_split(stage)
        prefill.send(messages.Prefilled(output(0), 16, 0.5, 0.25))
        decode.send(messages.Tokens([output(1)]))
        tokens = aiter(stream)
        assert [(await anext(tokens)).token.token_id for _ in range(2)] == [100, 101]
        decode.close()
        assert await anext(prefill) == messages.Serve(attempt(2), (100, 101))
        prefill.send(messages.Tokens([output(2)]))  # of the first attempt: it means nothing now
        last = renamed(output(2, FinishReason.LENGTH), "r~2")
        prefill.send(messages.Prefilled(last, 0, 9.0, 9.0))
        assert [token async for token in tokens] == [output(2, FinishReason.LENGTH)]
        assert stream.num_cached_tokens == 16
        assert stage.states() == {"p0": "ready", "d0": "starting"}
        assert not stage.router.ready()

    play(script)


@pytest.mark.fault(30)
def test_a_lost_prefill_worker_costs_a_pause_too() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, _ = await start_split(stage)
        prefill.close()
        assert await anext(decode) == messages.Abort("r")
        assert await anext(decode) == messages.Serve(attempt(2), ())

    play(script)


@pytest.mark.fault(39, 43)
def test_a_failed_handoff_is_followed_by_a_prefill_where_it_decodes() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, _ = await start_split(stage)
        decode.send(messages.Failed("r", "kv_corrupt", "pages of layer 1 are corrupt"))
        assert await anext(prefill) == messages.Abort("r")
        assert await anext(decode) == messages.Serve(attempt(2), ())

    play(script)


@pytest.mark.fault(33)
def test_with_nobody_left_the_stream_waits_for_somebody_to_come_back() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, stream = await start_split(stage)
        prefill.send(messages.Prefilled(output(0), 0, 0.0, 0.0))
        tokens = aiter(stream)
        assert (await anext(tokens)).index == 0
        prefill.close()
        assert await anext(decode) == messages.Abort("r")
        assert await anext(decode) == messages.Serve(attempt(2), (100,))
        decode.close()
        await asyncio.gather(*stage.tasks)
        with pytest.raises(UnavailableError):
            stage.router.submit(replace(LONG, request_id="new"))
        stage.clock.advance_to(20.0)
        stage.router.check_time()
        back = await stage.join(hello("d0", Role.DECODE, epoch=2))
        await confirm_canary(back)
        assert await anext(back) == messages.Serve(attempt(3), (100,))
        back.send(messages.Prefilled(renamed(output(1, FinishReason.LENGTH), "r~3"), 0, 0.0, 0.0))
        assert [token.index async for token in tokens] == [1]

    play(script)


async def confirm_canary(end: MemoryChannel[Any]) -> None:
    """A worker that has died gets one token to make before it gets anything else."""
    probe = await anext(end)
    assert probe.request.request_id.startswith("canary~")
    token = TokenOutput(probe.request.request_id, 0, SampledToken(1), FinishReason.LENGTH)
    end.send(messages.Prefilled(token, 0, 0.0, 0.0))


@pytest.mark.fault(33)
def test_with_nobody_back_in_time_the_stream_ends_with_the_reason() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, stream = await start_split(stage)
        prefill.close()
        assert await anext(decode) == messages.Abort("r")
        decode.close()
        failed = asyncio.create_task(anext(aiter(stream)))
        await asyncio.gather(*stage.tasks)
        stage.clock.advance_to(61.0)
        stage.router.check_time()
        with pytest.raises(UnavailableError, match="worker d0 was lost") as failure:
            await failed
        assert (failure.value.code, failure.value.status) == ("queue_timeout", 503)
        assert failure.value.retry_after > 0

    play(script)


@pytest.mark.parametrize("code", ["engine_corrupt", "kv_exhausted"])
def test_what_is_the_request_s_own_fault_is_not_tried_again(code: str) -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, stream = await start_split(stage)
        prefill.send(messages.Failed("r", code, "it cannot be served"))
        with pytest.raises(ServingError, match="it cannot be served"):
            await anext(aiter(stream))
        assert await anext(decode) == messages.Abort("r")

    play(script)


@pytest.mark.fault(33)
def test_without_workers_nothing_is_accepted() -> None:
    async def script(stage: Stage) -> None:
        assert not stage.router.ready()
        with pytest.raises(UnavailableError):
            stage.router.submit(LONG)

    play(script)


@pytest.mark.fault(44, 45)
@pytest.mark.parametrize(
    "misfit",
    [
        hello("d0", Role.DECODE, model=replace(MODEL, digest="x")),
        hello("d0", Role.DECODE, layout=replace(LAYOUT, num_layers=3)),
        hello("d0", Role.DECODE, model=replace(MODEL, max_model_len=99)),
        hello("p0", Role.PREFILL, epoch=1),
        hello("d0\nINFO all is well", Role.DECODE),
        messages.Hello(messages.WIRE_VERSION + 1, "d0", 1, 42, Role.DECODE, manifest()),
    ],
    ids=["model", "layout", "context", "same epoch", "name", "wire version"],
)
def test_a_worker_that_does_not_fit_is_refused_with_the_reason(misfit: messages.Hello) -> None:
    async def script(stage: Stage) -> None:
        await stage.join(hello("p0", Role.PREFILL))
        stranger = stage.connect()
        stranger.send(misfit)
        assert isinstance(await anext(stranger), messages.Refused)
        assert [view.worker_id for view in stage.router.workers() if view.state == "ready"] == ["p0"]

    play(script)


def test_workers_may_be_cut_differently_but_not_be_of_another_shape() -> None:
    async def script(stage: Stage) -> None:
        await stage.join(hello("p0", Role.PREFILL))
        four_ranks = replace(LAYOUT, block_size=32, data_parallel=2, tensor_parallel=2, expert_parallel=4)
        await stage.join(hello("d0", Role.DECODE, layout=four_ranks, num_blocks=8))
        view = next(view for view in stage.router.workers() if view.worker_id == "d0")
        assert (view.cut, view.block_size, view.num_blocks) == ("tp2 dp2 ep4", 32, 8)
        stranger = stage.connect()
        stranger.send(hello("d1", Role.DECODE, layout=replace(four_ranks, num_kv_heads=2)))
        refused = await anext(stranger)
        assert isinstance(refused, messages.Refused)
        assert refused.reason.endswith("num_kv_heads is 2 on one side and 1 on the other")

    play(script)


class NextHello(messages.Message, frozen=True, tag="Hello"):
    """A hello as some other version might send it."""

    wire_version: int
    worker_id: str
    colour: str


@pytest.mark.fault(45)
def test_a_hello_of_another_shape_is_refused_with_both_versions_in_mind() -> None:
    async def script(stage: Stage) -> None:
        stranger = stage.connect()
        stranger.send(NextHello(messages.WIRE_VERSION + 1, "d0", "green"))
        answer = await anext(stranger)
        assert isinstance(answer, messages.Refused)
        assert f"this router speaks wire version {messages.WIRE_VERSION}" in answer.reason
        assert [message async for message in stranger] == []

    play(script)


@pytest.mark.fault(46)
def test_a_newer_life_replaces_the_older_one() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, _ = await start_split(stage)
        await stage.join(hello("d0", Role.DECODE, epoch=2))
        assert await anext(prefill) == messages.Abort("r")
        assert await anext(prefill) == messages.Serve(attempt(2), ())  # the older one's work goes on elsewhere
        assert isinstance(await anext(decode), messages.Refused)  # so it does not come back
        with pytest.raises(StopAsyncIteration):
            await anext(decode)
        assert [view.epoch for view in stage.router.workers()] == [2, 1]

    play(script)


def test_what_an_older_life_said_last_is_not_taken_for_the_newer_one_s() -> None:
    async def script(stage: Stage) -> None:
        _, decode = await stage.pair()
        newer = stage.connect()
        newer.send(hello("d0", Role.DECODE, epoch=2))
        decode.send(messages.Heartbeat(WorkerStats(running=9)))  # read when the newer one has registered
        assert isinstance(await anext(newer), messages.Welcome)
        await stage.tasks[1]
        view = stage.policy.workers["d0"]
        assert (view.epoch, view.stats.running) == (2, 0)

    play(script)


@pytest.mark.fault(36)
def test_a_silent_worker_counts_as_lost() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, stream = await start_split(stage)
        stage.clock.advance_to(4.0)
        prefill.send(messages.Heartbeat(stage.router.workers()[0].stats))
        prefill.send(messages.Failed("r", "handoff_cancelled", ""))  # answered by an abort on the other side
        assert await anext(decode) == messages.Abort("r")
        stage.clock.advance_to(8.0)
        stage.router.check_time()
        assert stage.silent == ["d0"]
        assert stage.states() == {"p0": "ready", "d0": "starting"}

    play(script)


async def new_epoch(stage: Stage, worker_id: str, above: int = 0) -> tuple[MemoryChannel[Any], Any]:
    end = stage.connect()
    end.send(messages.WantEpoch(worker_id, above))
    return end, await anext(end)


def test_every_life_of_a_worker_from_elsewhere_has_a_higher_epoch() -> None:
    async def script(stage: Stage) -> None:
        epochs = []
        for worker_id in ("far", "far", "other", "far"):
            _, answer = await new_epoch(stage, worker_id)
            epochs.append(answer.epoch)
        assert epochs == sorted(set(epochs))
        _, answer = await new_epoch(stage, "far", above=1000)  # it remembers more than a router that was restarted
        assert answer == messages.NewEpoch(1001)

    play(script)


def test_the_names_of_the_servers_own_workers_are_taken() -> None:
    async def script(stage: Stage) -> None:
        _, answer = await new_epoch(stage, "d0")
        assert isinstance(answer, messages.Refused)
        assert "d0" in answer.reason

    play(script)


@pytest.mark.fault(37)
def test_a_decode_worker_that_leaves_hands_its_streams_over_with_their_kv() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, stream = await start_split(stage)
        prefill.send(messages.Prefilled(output(0), 0, 0.0, 0.0))
        decode.send(messages.Tokens([output(1)]))
        tokens = aiter(stream)
        assert [(await anext(tokens)).index, (await anext(tokens)).index] == [0, 1]
        decode.send(messages.Leaving())
        assert await anext(decode) == messages.Abort("r")
        assert await anext(prefill) == messages.Reserve(attempt(2), (100, 101))
        prefill.send(messages.Granted("r~2", b"another", 0))
        order = await anext(decode)
        assert order == messages.Prefill(attempt(2), (100, 101), b"another", manifest().endpoints[0])
        assert stage.states() == {"p0": "ready", "d0": "draining"}
        assert not stage.router.ready()
        second = stage.router.submit(replace(LONG, request_id="s"))
        assert second.route.header() == "local=p0"
        decode.send(messages.Prefilled(renamed(output(2), "r~2"), 192, 0.0, 0.0))
        assert (await anext(tokens)).index == 2
        prefill.send(messages.Tokens([renamed(output(3, FinishReason.LENGTH), "r~2")]))
        assert [token.index async for token in tokens] == [3]
        assert await anext(decode) == messages.Shutdown()

    play(script)


def test_a_worker_that_leaves_with_nobody_to_hand_over_to_finishes_what_it_has() -> None:
    async def script(stage: Stage) -> None:
        alone = await stage.join(hello("m0", Role.MIXED))
        stream = stage.router.submit(LONG)
        assert await anext(alone) == messages.Serve(LONG, ())
        alone.send(messages.Prefilled(output(0), 0, 0.0, 0.0))
        alone.send(messages.Leaving())
        alone.send(messages.Tokens([output(1, FinishReason.LENGTH)]))
        assert [token.index async for token in stream] == [0, 1]
        assert await anext(alone) == messages.Shutdown()

    play(script)


@pytest.mark.fault(36)
def test_what_an_older_life_still_sends_means_nothing() -> None:
    """As after SIGSTOP, a new registration, and SIGCONT."""

    async def script(stage: Stage) -> None:
        prefill, decode, stream = await start_split(stage)
        stage.clock.advance_to(6.0)
        decode.send(messages.Tokens([output(0)]))  # it wakes up, too late
        decode.send(messages.Heartbeat(WorkerStats()))
        stage.router.check_time()  # both are silent: the streams wait
        assert stage.states() == {"p0": "starting", "d0": "starting"}
        for end in (prefill, decode):  # they see that their lives are over
            assert [type(message) async for message in end] in ([], [messages.Abort])
        with pytest.raises(UnavailableError):  # and nobody takes a ghost for a worker
            stage.router.submit(replace(LONG, request_id="s"))
        stage.clock.advance_to(7.0)
        back = await stage.join(hello("d0", Role.DECODE, epoch=2))
        await confirm_canary(back)
        assert await anext(back) == messages.Serve(attempt(2), ())
        back.send(messages.Prefilled(renamed(output(0, FinishReason.LENGTH), "r~2"), 0, 0.0, 0.0))
        assert [token.index async for token in stream] == [0]

    play(script)


def test_a_prefill_worker_may_leave_once_the_decode_worker_has_gone_on() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, stream = await start_split(stage)
        prefill.send(messages.Leaving())
        prefill.send(messages.Prefilled(output(0), 0, 0.0, 0.0))
        tokens = aiter(stream)
        assert (await anext(tokens)).index == 0
        assert stage.router.workers()[1].state == "draining"
        decode.send(messages.Tokens([output(1)]))
        assert await anext(prefill) == messages.Shutdown()
        decode.send(messages.Tokens([output(2, FinishReason.LENGTH)]))
        assert [token.index async for token in tokens] == [1, 2]

    play(script)


def test_a_worker_without_work_may_leave_at_once() -> None:
    async def script(stage: Stage) -> None:
        prefill, _ = await stage.pair()
        prefill.send(messages.Leaving())
        assert await anext(prefill) == messages.Shutdown()

    play(script)


def test_a_router_that_drains_takes_nothing_new_and_waits_for_what_runs() -> None:
    async def script(stage: Stage) -> None:
        alone = await stage.join(hello("m0", Role.MIXED))
        stream = stage.router.submit(LONG)
        assert stage.router.ready()
        draining = asyncio.create_task(stage.router.drain(25.0))
        await anext(alone)
        await asyncio.sleep(0)
        assert not stage.router.ready()
        with pytest.raises(UnavailableError) as refusal:
            stage.router.submit(replace(LONG, request_id="s"))
        assert refusal.value.code == "draining"
        with pytest.raises(UnavailableError, match="about to end"):
            stage.router.check("")
        assert not draining.done()
        alone.send(messages.Prefilled(output(0, FinishReason.LENGTH), 0, 0.0, 0.0))
        assert await draining
        assert [token.index async for token in stream] == [0]

    play(script)


def test_a_router_that_drains_does_not_wait_for_ever() -> None:
    async def script(stage: Stage) -> None:
        await stage.join(hello("m0", Role.MIXED))
        stage.router.submit(LONG)
        assert not await stage.router.drain(0.0)

    play(script)


def test_a_router_that_stood_still_blames_nobody_for_silence() -> None:
    async def script(stage: Stage) -> None:
        await stage.pair()
        stage.clock.advance_to(30.0)
        stage.router.on_beat()
        assert stage.states() == {"p0": "ready", "d0": "ready"}
        for now in (31.0, 33.0, 35.0, 36.0):
            stage.clock.advance_to(now)
            stage.router.on_beat()
        assert stage.states() == {"p0": "starting", "d0": "starting"}

    play(script)


def test_pages_for_another_host_do_not_go_through_memory() -> None:
    endpoints = (
        KVEndpoint(transport="shm", address="unix:/nowhere"),
        KVEndpoint(transport="tcp", address="tls:10.0.0.1:1"),
    )

    async def script(stage: Stage) -> None:
        far = await stage.join(hello("far", Role.PREFILL, host="b", endpoints=endpoints))
        near = await stage.join(hello("near", Role.PREFILL, host="a", endpoints=endpoints))
        await stage.join(hello("d0", Role.DECODE, host="a", endpoints=endpoints))
        assert await anext(far) == messages.WarmUp("d0", 1, endpoints[1])
        assert await anext(near) == messages.WarmUp("d0", 1, endpoints[0])

    play(script)
