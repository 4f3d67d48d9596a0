"""Workers that leave, and a router that drains."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from router_stage import LONG, Stage, attempt, hello, manifest, output, play, renamed, start_split

from diptych.core.errors import UnavailableError
from diptych.core.fleet import Readiness, Role
from diptych.core.request import FinishReason
from diptych.wire import messages


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
        assert stage.router.readiness() is Readiness.NO
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
        assert stage.router.readiness() is Readiness.YES
        draining = asyncio.create_task(stage.router.drain(25.0))
        await anext(alone)
        await asyncio.sleep(0)
        assert stage.router.readiness() is Readiness.NO
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


def test_what_still_runs_at_the_end_ends_with_an_error_and_workers_let_go_of_it() -> None:
    async def script(stage: Stage) -> None:
        alone = await stage.join(hello("m0", Role.MIXED))
        stream = stage.router.submit(LONG)
        await anext(alone)
        stage.router.end_requests()
        with pytest.raises(UnavailableError) as end:
            await anext(aiter(stream))
        assert end.value.code == "draining"
        assert await anext(alone) == messages.Abort(LONG.request_id)
        with pytest.raises(UnavailableError):
            stage.router.submit(replace(LONG, request_id="s"))

    play(script)
