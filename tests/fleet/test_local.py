"""Supervision of worker processes: ends and restarts."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from diptych.core.fleet import Role
from diptych.core.settings import WorkerSettings
from diptych.fleet import local
from diptych.fleet.local import LocalFleet


def test_who_stops_does_not_wait_for_a_restart_that_is_due_much_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "COMMAND", (sys.executable, "-c", "raise SystemExit(1)"))
    monkeypatch.setattr(local, "LONGEST_BACKOFF", 3600.0)
    monkeypatch.setattr(local, "FIRST_BACKOFF", 3600.0)
    settings = WorkerSettings(worker_id="w", role=Role.MIXED, epoch=1, router="", key=b"", run_dir=str(tmp_path))

    async def scenario() -> None:
        waiting = asyncio.Event()
        monkeypatch.setattr(local.log, "warning", lambda *_: waiting.set())
        fleet = LocalFleet([settings])
        fleet.confirm_started("w")
        async with asyncio.timeout(30):
            fleet.start()
            await waiting.wait()
            await fleet.stop()

    asyncio.run(scenario())
