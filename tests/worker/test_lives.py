"""A life of a worker, and what the next one finds."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from diptych.core.errors import TransferError
from diptych.core.fleet import Role
from diptych.core.settings import WorkerSettings
from diptych.engine.scripted import ScriptedEngine, ScriptedModel
from diptych.transfer import frames, receiver
from diptych.wire import messages
from diptych.wire.blocking import BlockingConnection, dial
from diptych.wire.channel import memory_pair
from diptych.worker.data_plane import share_kv
from diptych.worker.main import End, Loaded, serve

KEY = b"k" * 32
SECONDS = 20


async def a_life(directory: Path, *, source_is_frozen: bool) -> End:
    """It ends with its router, while a source of this machine is connected."""
    engine = ScriptedEngine(ScriptedModel())
    settings = WorkerSettings(
        worker_id="w", role=Role.MIXED, epoch=1, router="", key=KEY, run_dir=str(directory), transports=("shm",)
    )
    ours, router = memory_pair(messages.ToWorker, messages.FromWorker)
    loaded = Loaded(engine, share_kv(engine, 8))
    life = asyncio.create_task(serve(settings, loaded, ours, asyncio.Event().wait))
    hello = await anext(router)
    assert isinstance(hello, messages.Hello)
    source: BlockingConnection[Any] = await asyncio.to_thread(
        dial, hello.manifest.endpoints[0].address, KEY, frames.FromTarget
    )
    about = hello.manifest.layout, hello.manifest.model.digest
    source.send(frames.PushHello(messages.WIRE_VERSION, "p", *about, False))
    assert isinstance(await asyncio.to_thread(source.receive, SECONDS), frames.PushWelcome)
    lets_go = threading.Thread(target=lambda: (source.drain(), source.close()))
    if not source_is_frozen:
        lets_go.start()
    router.close()
    try:
        return await life
    finally:
        if source_is_frozen:
            lets_go.start()
        lets_go.join(SECONDS)


def test_a_source_that_lets_go_makes_room_for_the_next_life(tmp_path: Path) -> None:
    assert asyncio.run(a_life(tmp_path, source_is_frozen=False)) is End.ROUTER_GONE


def test_there_is_no_next_life_in_memory_that_a_frozen_source_may_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "CLOSE_SECONDS", 0.05)
    with pytest.raises(TransferError, match="let go"), contextlib.suppress(BufferError):
        asyncio.run(a_life(tmp_path, source_is_frozen=True))
