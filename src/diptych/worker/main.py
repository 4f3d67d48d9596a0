"""A worker's life: pin, load, join the router, serve, leave.

    1. pin to the cores given, before anything heavy is imported
    2. load the engine and take the KV memory
    3. connect to the router and say what is here; a refusal ends the process with the reason
    4. serve until told to shut down, until SIGTERM, or until the router is gone
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from diptych.core.blocks import blocks_for
from diptych.core.clock import WallClock
from diptych.core.errors import ConfigError, HandshakeError, PeerError
from diptych.core.events import (
    AbortRequested,
    PrefillRequested,
    ReserveRequested,
    ServeRequested,
)
from diptych.core.fleet import Manifest
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.ports import Engine
from diptych.core.settings import WorkerSettings
from diptych.policy.batching import BatchLimits
from diptych.policy.block_pool import BlockPool, Eviction
from diptych.policy.worker import WorkerPolicy
from diptych.telemetry.journal import open_journal
from diptych.wire import messages
from diptych.wire.channel import Channel, connect
from diptych.wire.tickets import open_ticket
from diptych.worker.data_plane import DataPlane
from diptych.worker.loop import WorkerLoop

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.25  # of the machine's free memory, for the KV of one worker, unless told otherwise
DEFAULT_REQUESTS = 16  # or what this many requests of full length need, if that is less


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What the composition root hands in: an engine that is loaded, and the KV memory's maker."""

    engine: Engine
    layout: KVLayout
    data_plane: Callable[[WorkerSettings, KVMemory, Manifest], DataPlane]


def pin(cores: tuple[int, ...]) -> None:
    """Bind this process to its cores."""
    if cores:
        os.sched_setaffinity(0, cores)


def kv_blocks(settings: WorkerSettings, layout: KVLayout, max_model_len: int) -> int:
    """How many KV blocks to take. Raises ConfigError if not even one request of full length fits."""
    tokens = settings.cache.kv_tokens
    if tokens is None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        tokens = min(int(free * MEMORY_SHARE) // layout.token_bytes, DEFAULT_REQUESTS * max_model_len)
    if tokens < max_model_len:
        raise ConfigError(
            f"{tokens} tokens of KV cache cannot hold one request of {max_model_len} tokens; "
            "raise --kv-cache-tokens or lower --max-model-len"
        )
    return blocks_for(tokens, layout.block_size)


async def run_worker(settings: WorkerSettings, load: Callable[[OnProgress], Engine]) -> None:
    """Live one worker's life. Returns at an orderly end; raises DiptychError with the reason otherwise."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    channel = await connect(settings.router, settings.key)
    engine = await _load(settings, load, channel)
    with contextlib.closing(engine):
        num_blocks = kv_blocks(settings, engine.layout, engine.model.max_model_len)
        with open_memory(settings, engine, num_blocks) as memory:
            await _serve(settings, engine, memory, channel, stop)


async def _load(settings: WorkerSettings, load: Callable[[OnProgress], Engine], channel: Channel) -> Engine:
    """Load the engine on another thread, telling the router how far it is."""
    loop = asyncio.get_running_loop()

    def on_progress(done: int, total: int) -> None:
        loop.call_soon_threadsafe(channel.send, messages.Loading(settings.worker_id, done, total))

    return await loop.run_in_executor(None, load, on_progress)
