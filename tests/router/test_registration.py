"""Who may join a router, and whose life counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from router_stage import LAYOUT, MODEL, Stage, attempt, hello, manifest, play, start_split

from diptych.core.fleet import KVEndpoint, Role, WorkerStats
from diptych.wire import messages
from diptych.wire.channel import MemoryChannel


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
        decode.send(messages.Heartbeat(WorkerStats(running=9), 0, ()))  # read when the newer one has registered
        assert isinstance(await anext(newer), messages.Welcome)
        await stage.tasks[1]
        view = stage.policy.workers["d0"]
        assert (view.epoch, view.stats.running) == (2, 0)

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
