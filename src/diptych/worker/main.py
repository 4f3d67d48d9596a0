"""A worker's life: load, join the router, serve, leave.

1. connect to the router, load the engine (telling the router how far it is), take the KV memory
2. say what is here; a refusal ends the process with the reason
3. serve until told to shut down, until a signal (`worker.departure`), or until the router is gone or silent

This is the life of a worker that `fleet.local` supervises; `worker.joining` makes several of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from diptych.chaos.failpoints import failpoint
from diptych.core.blocks import blocks_for
from diptych.core.clock import WallClock
from diptych.core.errors import ConfigError, HandshakeError, PeerError, TransferError
from diptych.core.events import AbortRequested, PrefillRequested, ReserveRequested, ServeRequested
from diptych.core.fleet import Manifest
from diptych.core.kv_layout import KVLayout
from diptych.core.ports import Engine
from diptych.core.settings import WorkerSettings
from diptych.policy.batching import BatchLimits
from diptych.policy.block_pool import BlockPool, Eviction
from diptych.policy.data_parallel import DataParallelPolicy
from diptych.policy.worker import WorkerPolicy
from diptych.telemetry.journal import open_journal
from diptych.transfer.memory import available_memory
from diptych.wire import messages
from diptych.wire.channel import Channel, connect
from diptych.wire.tickets import open_ticket
from diptych.worker.data_plane import DataPlane, SharedKV, share_kv
from diptych.worker.departure import Departure
from diptych.worker.host import host_identity
from diptych.worker.loop import WorkerLoop
from diptych.worker.router_watch import RouterWatch

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
RouterChannel = Channel[messages.ToWorker]

MEMORY_SHARE = 0.25  # of the machine's available memory, for the KV of one worker, unless told otherwise
DEFAULT_REQUESTS = 16  # or what this many requests of full length need, if that is less


@dataclass(frozen=True, slots=True)
class Loaded:
    """What outlasts a life: an engine and its KV memory."""

    engine: Engine
    kv: SharedKV


class End(Enum):
    """How a life has ended."""

    TOLD = auto()  # by the router
    LEFT = auto()  # by its own wish
    ROUTER_GONE = auto()


async def run_worker(settings: WorkerSettings, load: Callable[[OnProgress], Engine]) -> End:
    """Live one worker's life. Returns how it ended; raises DiptychError with the reason if that was not orderly."""
    departure = Departure()
    channel = await connect(settings.router, settings.key, messages.ToWorker)
    loaded = await load_engine(settings, load, channel)
    with contextlib.closing(loaded.engine):
        return await serve(settings, loaded, channel, functools.partial(departure.take, channel, settings.grace))


async def load_engine(settings: WorkerSettings, load: Callable[[OnProgress], Engine], channel: RouterChannel) -> Loaded:
    """Load the engine on another thread, telling the router how far it is, and take its KV memory."""
    loop = asyncio.get_running_loop()

    def on_progress(done: int, total: int) -> None:
        loop.call_soon_threadsafe(channel.send, messages.Loading(settings.worker_id, done, total))

    engine = await loop.run_in_executor(None, load, on_progress)
    return Loaded(engine, share_kv(engine, kv_blocks(settings, engine.layout, engine.model.max_model_len)))


def kv_blocks(settings: WorkerSettings, layout: KVLayout, max_model_len: int) -> int:
    """How many KV blocks to take for each data-parallel rank, of an even share of the worker's tokens. Raises
    ConfigError if not even one request of full length fits."""
    ranks = layout.data_parallel
    tokens = settings.cache.kv_tokens
    if tokens is None:
        token_bytes = layout.token_bytes * layout.replication  # with the copies on other tensor ranks
        affordable = int(available_memory() * MEMORY_SHARE) // token_bytes
        tokens = min(affordable, max(ranks, DEFAULT_REQUESTS) * max_model_len)
    if tokens // ranks < max_model_len:
        each = f" on each of {ranks} data-parallel ranks" if ranks > 1 else ""
        raise ConfigError(
            f"{tokens // ranks} tokens of KV cache{each} cannot hold one request of {max_model_len} tokens; "
            "raise --kv-cache-tokens or lower --max-model-len"
        )
    return blocks_for(tokens // ranks, layout.block_size)


async def serve(
    settings: WorkerSettings, loaded: Loaded, channel: RouterChannel, leaving: Callable[[], Coroutine[Any, Any, object]]
) -> End:
    """Register and serve, until the router ends it or `leaving()` does. Raises HandshakeError if refused, and
    TransferError if there must be no further life in this memory."""
    engine, kv = loaded.engine, loaded.kv
    with contextlib.closing(open_journal(settings.journal)) as journal:
        policy = _policy(settings, engine, kv)
        worker = WorkerLoop(settings, policy, engine, channel, clock=WallClock(), journal=journal)
        data = DataPlane(settings, kv, engine.model.digest, worker.post)
        manifest = Manifest(
            model=engine.model,
            layout=kv.layout,
            num_blocks=kv.num_blocks,
            endpoints=data.endpoints,
            host=host_identity(),
        )
        worker.start(data, manifest)
        channel.send(
            messages.Hello(
                messages.WIRE_VERSION, settings.worker_id, settings.epoch, os.getpid(), settings.role, manifest
            )
        )
        watch = RouterWatch(WallClock())
        receiving = asyncio.create_task(_receive(settings, channel, worker, watch))
        silence = asyncio.create_task(watch.until_silent())
        tasks: list[asyncio.Future[Any]] = [
            receiving,
            silence,
            asyncio.create_task(worker.beat()),
            asyncio.create_task(leaving()),
            _first_failed_callback(),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            left = End.ROUTER_GONE if silence in done else End.LEFT
            end = receiving.result() if receiving in done else left
        finally:
            for task in tasks:
                task.cancel()
            quiet = await worker.stop()
            channel.close()
        if end is End.ROUTER_GONE and not quiet:
            raise TransferError("a source on this host has not let go of the KV memory, so no other life may use it")
        return end


def _first_failed_callback() -> asyncio.Future[None]:
    """Fails with the first exception that escapes a callback of this loop. A worker whose bookkeeping has
    gone wrong must not go on: it ends, and its successor starts with a new epoch."""
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()

    def on_exception(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        log.error("%s", context["message"], exc_info=context.get("exception"))
        if not failed.done():
            failed.set_exception(context.get("exception") or RuntimeError(context["message"]))

    loop.set_exception_handler(on_exception)
    return failed


def _policy(settings: WorkerSettings, engine: Engine, kv: SharedKV) -> WorkerPolicy | DataParallelPolicy:
    """A brain for each data-parallel rank, and what keeps them in step if there are several."""
    limits = BatchLimits(settings.batch.max_batch_tokens, settings.batch.max_sequences)

    def rank(data_rank: int) -> WorkerPolicy:
        pool = BlockPool(
            kv.blocks_per_rank,
            kv.layout.block_size,
            eviction=Eviction(settings.cache.eviction),
            prefix_caching=settings.cache.prefix_caching,
        )
        return WorkerPolicy(kv.layout, pool, limits, engine.model.eos_token_ids, data_rank=data_rank)

    ranks = [rank(data_rank) for data_rank in range(kv.layout.data_parallel)]
    return ranks[0] if len(ranks) == 1 else DataParallelPolicy(ranks)


async def _receive(settings: WorkerSettings, channel: RouterChannel, worker: WorkerLoop, watch: RouterWatch) -> End:
    """Turn the router's messages into events, until it says to end or is gone."""
    async for message in channel:
        watch.heard()
        match message:
            case messages.Ping(number):
                worker.answer(number)
            case messages.Serve(request, outputs):
                worker.handle(ServeRequested(request, outputs))
            case messages.Reserve(request, outputs):
                worker.handle(ReserveRequested(request, outputs))
            case messages.Prefill(request, outputs, ticket, endpoint):
                try:
                    claims = open_ticket(ticket, settings.key)
                except PeerError as error:
                    worker.data.count("forged ticket")
                    channel.send(messages.Failed(request.request_id, error.code, error.message))
                    continue
                worker.data.open_link(claims.worker_id, claims.epoch, endpoint)
                worker.handle(PrefillRequested(request, claims, outputs))
                failpoint("request.queued")
            case messages.Abort(request_id):
                worker.handle(AbortRequested(request_id))
            case messages.WarmUp(worker_id, epoch, endpoint):
                worker.data.open_link(worker_id, epoch, endpoint)
            case messages.Refused(reason):
                raise HandshakeError(f"the router refused this worker: {reason}")
            case messages.Welcome():
                log.info("worker %s, epoch %d, serves", settings.worker_id, settings.epoch)
            case messages.Shutdown():
                return End.TOLD
    return End.ROUTER_GONE
