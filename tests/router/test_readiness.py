"""What a router says of its fleet as a whole."""

from __future__ import annotations

from typing import Any

import pytest
from router_stage import Stage, output, play, renamed, until

from diptych.core.fleet import Readiness
from diptych.core.request import FinishReason
from diptych.policy.recovery import RecoverySettings
from diptych.wire import messages
from diptych.wire.channel import MemoryChannel

TRYING = RecoverySettings(try_paths=True)


async def canary(prefill: MemoryChannel[Any], decode: MemoryChannel[Any]) -> str:
    """The next canary, on its way to the prefill worker; returns its name."""
    while not isinstance(reserve := await anext(decode), messages.Reserve):
        pass
    decode.send(messages.Granted(reserve.request.request_id, b"ticket", 0))
    while not isinstance(await anext(prefill), messages.Prefill):
        pass
    name: str = reserve.request.request_id
    return name


def test_a_fleet_is_ready_once_a_pair_has_handed_over() -> None:
    async def script(stage: Stage) -> None:
        prefill, decode = await stage.pair()
        name = await canary(prefill, decode)
        prefill.send(messages.Prefilled(renamed(output(0), name), 0, 0.0, 0.0))
        assert stage.router.readiness() is Readiness.NO
        decode.send(messages.Tokens([renamed(output(1, FinishReason.LENGTH), name)]))
        await until(lambda: stage.router.readiness() is Readiness.YES)

    play(script, TRYING)


def test_a_broken_path_is_said_once_and_so_is_its_repair(caplog: pytest.LogCaptureFixture) -> None:
    def beat(stage: Stage, *times: float) -> list[str]:
        """What the log says of the router's beats."""
        caplog.clear()
        for now in times:
            stage.clock.advance_to(now)
            stage.router.on_beat()
        return [record.message for record in caplog.records]

    async def script(stage: Stage) -> None:
        prefill, decode = await stage.pair()
        decode.send(messages.Failed(await canary(prefill, decode), "transfer_failed", "no route to host"))
        await until(lambda: stage.router.readiness() is Readiness.DEGRADED)
        [line] = beat(stage, 1.0, 2.0)
        assert "served un-split" in line
        name = await canary(prefill, decode)
        prefill.send(messages.Prefilled(renamed(output(0), name), 0, 0.0, 0.0))
        decode.send(messages.Tokens([renamed(output(1, FinishReason.LENGTH), name)]))
        await until(lambda: stage.router.readiness() is Readiness.YES)
        assert beat(stage, 3.0, 4.0) == ["KV is handed over again"]

    play(script, TRYING)
