"""A stream through the shell of the router, whatever happens to its workers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from router_stage import LONG, Stage, attempt, confirm_canary, hello, output, play, renamed, start_split

from diptych.core.errors import ServingError, UnavailableError
from diptych.core.fleet import Readiness, Role
from diptych.core.request import FinishReason
from diptych.wire import messages


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
        assert stage.router.readiness() is Readiness.NO

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
        assert stage.router.readiness() is Readiness.NO
        with pytest.raises(UnavailableError):
            stage.router.submit(LONG)

    play(script)
