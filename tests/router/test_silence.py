"""Silence in one direction or both, between a router and its workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from router_stage import LONG, Stage, attempt, confirm_canary, hello, output, play, renamed, start_split, until

from diptych.core.errors import UnavailableError
from diptych.core.fleet import Role, WorkerStats
from diptych.core.request import FinishReason
from diptych.wire import messages
from diptych.wire.channel import MemoryChannel

STATS = WorkerStats()


async def answer(stage: Stage, end: MemoryChannel[Any], now: float) -> list[Any]:
    """A beat of the router, which this worker answers. Returns what else it was told."""
    stage.clock.advance_to(now)
    stage.router.on_beat()
    told = []
    while not isinstance(message := await anext(end), messages.Ping):
        told.append(message)
    end.send(messages.Heartbeat(WorkerStats(running=int(now)), message.number, ()))
    await until(lambda: any(view.stats.running == int(now) for view in stage.router.workers()))
    return told


@pytest.mark.fault(36)
def test_a_silent_worker_counts_as_lost() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, _ = await start_split(stage)
        for beat in range(1, 7):
            await answer(stage, prefill, float(beat))
        assert stage.silent == ["d0"]
        assert stage.states() == {"p0": "ready", "d0": "starting"}
        assert [message async for message in decode] == [messages.Ping(1)]  # which was not worth repeating

    play(script)


@pytest.mark.fault(36)
def test_a_worker_that_hears_nothing_counts_as_lost_however_much_it_says() -> None:
    """What the router sends to it is lost on the way; what it sends arrives."""

    async def script(stage: Stage) -> None:
        prefill, decode, stream = await start_split(stage)
        for beat in range(1, 7):
            decode.send(messages.Heartbeat(STATS, 0, ()))
            decode.send(messages.Tokens([output(beat)]))
            told = await answer(stage, prefill, float(beat))
        assert stage.silent == ["d0"]
        assert told == [messages.Abort("r"), messages.Serve(attempt(2), ())]

    play(script)


def test_answers_to_other_pings_prove_nothing() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode, _ = await start_split(stage)
        for beat in range(1, 7):
            decode.send(messages.Heartbeat(STATS, beat + 1, ()))
            await answer(stage, prefill, float(beat))
        assert stage.silent == ["d0"]

    play(script)


@pytest.mark.fault(36)
def test_what_an_older_life_still_sends_means_nothing() -> None:
    """As after SIGSTOP, a new registration, and SIGCONT."""

    async def script(stage: Stage) -> None:
        prefill, decode, stream = await start_split(stage)
        stage.clock.advance_to(6.0)
        decode.send(messages.Tokens([output(0)]))  # it wakes up, too late
        decode.send(messages.Heartbeat(STATS, 0, ()))
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
