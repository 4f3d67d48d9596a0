"""Supervision when even starting a process fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from diptych.core.fleet import Role
from diptych.core.settings import EngineSettings, WorkerSettings
from diptych.fleet import local
from diptych.fleet.local import LocalFleet


def settings(run_dir: Path) -> WorkerSettings:
    engine = EngineSettings(kind="scripted")
    return WorkerSettings(
        worker_id="w", role=Role.MIXED, epoch=1, router="unix:/x", key=b"k" * 32, run_dir=str(run_dir), engine=engine
    )


def test_a_first_start_that_fails_is_told_to_whoever_waits(tmp_path: Path) -> None:
    async def run() -> None:
        fleet = LocalFleet([settings(tmp_path / "gone")])
        fleet.start()
        async with asyncio.timeout(20):
            error = await fleet.failed
        assert error.message == "worker w did not start: exit status 71"
        await fleet.stop()

    asyncio.run(run())


def test_a_later_start_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "FIRST_BACKOFF", 0.001)

    async def run() -> None:
        fleet = LocalFleet([settings(tmp_path / "gone")])
        fleet.confirm_started("w")
        fleet.start()
        async with asyncio.timeout(20):
            while len(caplog.records) < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        for task in fleet._tasks:
            task.cancel()
        assert not fleet.failed.done()

    asyncio.run(run())
    assert "worker w cannot be started: No such file or directory" in caplog.messages
