"""Composition of `diptych serve`: front and router in this process, workers as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diptych.chaos import failpoints
from diptych.chaos.failpoints import failpoint
from diptych.core.clock import WallClock
from diptych.core.errors import ConfigError, in_words
from diptych.core.fleet import Role, WorkerId, WorkerState, can_serve
from diptych.core.settings import BatchSettings, CacheSettings, CutSettings, EngineSettings, WorkerSettings
from diptych.engine.hub import resolve_checkpoint
from diptych.fleet.local import LocalFleet
from diptych.fleet.placement import place
from diptych.front.app import create_app
from diptych.front.http_protocol import ConnectionLimits
from diptych.front.server import bind, connection_limits
from diptych.front.server import serve as http_serve
from diptych.front.settings import FrontSettings
from diptych.front.tenants import TenantKeys, Tenants
from diptych.front.tokenizer import ByteTokenizer, Tokenizer
from diptych.policy.admission import AdmissionLimits
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.recovery import RecoverySettings
from diptych.policy.routing import Routing
from diptych.router.dispatch import FleetCallbacks, Router
from diptych.run_directory import run_directory
from diptych.signals import OperatorSignals
from diptych.startup import Screen
from diptych.telemetry.journal import open_journal
from diptych.wire import messages
from diptych.wire.address import TcpAddress, advertised, parse_host_port
from diptych.wire.channel import Listener, listen
from diptych.wire.key_file import read_or_create_key

log = logging.getLogger(__name__)

TRANSPORTS = {"auto": ("shm", "tcp"), **{name: (name,) for name in ("shm", "tcp", "nixl", "fastest")}}
KEY_BYTES = 32
MIN_BODY_VALUES = 1 << 17  # and twice the context, for prompts of token ids

BUILTIN_MODEL = Path(__file__).parent / "builtin_model"
BUILTIN_NAME = "recall"
BUILTIN_EXAMPLE = (
    "Codes: heron 471, maple 902, birch 118, comet 350, otter 267, violin 684, lantern 519, granite 736. "
    "What is the code of otter?"
)
PLAIN_EXAMPLE = "Why is the sky blue?"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """How many workers of each role, how they are cut, and how pages travel between them."""

    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    cuts: Mapping[Role, CutSettings] = field(default_factory=dict)
    transport: str = "auto"

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"--transport {self.transport}: one of {', '.join(TRANSPORTS)}")

    def roles(self) -> dict[WorkerId, Role]:
        """Worker ids and roles, prefill workers first."""
        counts = ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode), (Role.MIXED, self.mixed))
        return {f"{role}-{index}": role for role, count in counts for index in range(count)}

    def cut(self, role: Role) -> CutSettings:
        return self.cuts.get(role, CutSettings())


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """Where the front listens, who may come in, and under which names the model goes."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    max_requests: int = 1024
    max_queue_seconds: float = 60.0
    max_connections: int = 8192
    checkpoint_tokens: int = 0
    race_prefill: int = 1
    tenants: Tenants = field(default_factory=Tenants)

    @property
    def keys(self) -> TenantKeys:
        """Those of the flags, and those of the tenants."""
        return TenantKeys(TenantKeys.of(self.api_keys).owners + self.tenants.keys.owners)

    @property
    def admission(self) -> AdmissionLimits:
        return AdmissionLimits(
            max_requests=self.max_requests,
            max_queue_seconds=self.max_queue_seconds,
            anybody=self.tenants.anybody,
            tenants=self.tenants.limits,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinPoint:
    """Where workers from elsewhere are taken in, and how they prove that they may.

    `address` is HOST:PORT; `advertise` is where they reach our own workers (None: at the same host)."""

    address: str
    key_file: Path
    tls: bool = False
    advertise: str | None = None

    @property
    def listen_address(self) -> TcpAddress:
        """Raises ConfigError if it is none, or a routable one without TLS."""
        return parse_host_port(self.address, tls=self.tls)

    @property
    def data_host(self) -> str:
        """Raises ConfigError if it is not known."""
        address = self.listen_address
        return advertised(replace(address, host=self.advertise or address.host)).host

    def flags(self, address: str) -> str:
        """With which flags `diptych worker` joins here; `address` is where this really listens."""
        tls = " --tls" if self.tls else ""
        return f"--join {address.partition(':')[2]}{tls} --key-file {self.key_file.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Everything `diptych serve` is told, by the part that it concerns.

    Raises ConfigError if there could never be a worker."""

    pools: PoolSettings = field(default_factory=PoolSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    join: JoinPoint | None = None
    grace_seconds: float = 30.0  # for running requests, once it is told to end
    journal: Path | None = None

    def __post_init__(self) -> None:
        if not self.pools.roles() and self.join is None:
            raise ConfigError("no workers: give --prefill and --decode, or --mixed, or --listen for others to join")
        if self.join is not None and "tcp" not in self.transports:
            raise ConfigError(f"--transport {self.pools.transport} does not reach workers that --listen lets in")
        if self.http.checkpoint_tokens and not self.cache.prefix_caching:
            raise ConfigError("--checkpoint-tokens needs the prefix cache: it is where copies come from and go to")

    @property
    def transports(self) -> tuple[str, ...]:
        return TRANSPORTS[self.pools.transport]

    @property
    def front(self) -> FrontSettings:
        """Raises ConfigError if clients could not be served so."""
        return FrontSettings(
            served_model_names=self.http.served_model_names or (self.engine.served_name,),
            keys=self.http.keys,
            checkpoint_tokens=self.http.checkpoint_tokens,
            copies=self.cache.prefix_caching,
            race=self.http.race_prefill,
        )


def engine_settings(model: str | None, **options: Any) -> EngineSettings:
    """The engine's settings, its model resolved to a directory here (None: the model that comes along).

    Raises CheckpointError if there is no such model."""
    if options["kind"] == "scripted":
        return EngineSettings(served_name="scripted", **options)
    if model is None:
        return EngineSettings(model=str(BUILTIN_MODEL), served_name=BUILTIN_NAME, **options)
    directory = resolve_checkpoint(model)
    return EngineSettings(model=str(directory), served_name=served_name(model), **options)


def served_name(model: str) -> str:
    """What clients call a model unless told otherwise: a hub id as it is, a directory by its last part."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def run(settings: ServeSettings) -> None:
    """Serve until SIGINT (at once) or SIGTERM (no new requests, and `grace_seconds` for those that run; a second
    signal ends it at once). SIGHUP restarts every worker, one after another, except in a terminal, where it says that
    the terminal is gone. Raises ConfigError if it cannot start."""
    import uvloop

    failpoints.arm("router", 1)
    uvloop.run(_serve(settings))


@dataclass(slots=True)
class _Fleet:
    """Router and workers while they run. `started` ends when all workers have registered once, `failed` (with an
    exception) if they cannot, or if the router's loop breaks down."""

    router: Router
    workers: LocalFleet
    screen: Screen
    started: asyncio.Task[Any]
    failed: asyncio.Task[None]

    def check(self) -> None:
        """Raises why it has failed, if it has."""
        if self.failed.done():
            self.failed.result()


async def _failure(workers: LocalFleet, beating: asyncio.Task[None]) -> None:
    """Raises what ends the server. Without its beat a router would notice nothing any more."""
    await asyncio.wait({workers.failed, beating}, return_when=asyncio.FIRST_COMPLETED)
    if workers.failed.done():
        raise workers.failed.result()
    beating.result()


async def _serve(settings: ServeSettings) -> None:
    front = settings.front  # what is wrong with it is said before the workers load
    signals = OperatorSignals()
    draining, stopping = asyncio.create_task(signals.drain.wait()), asyncio.create_task(signals.stop.wait())
    connections = connection_limits(settings.http.max_connections)
    sock = bind(settings.http.host, settings.http.port)  # before the workers load: a port in use is known at once
    async with _fleet(settings) as fleet:
        await asyncio.wait({fleet.started, fleet.failed, draining}, return_when=asyncio.FIRST_COMPLETED)
        fleet.check()
        if not signals.drain.is_set():
            signals.on_hangup(fleet.workers.restart_each)
            async with _front(settings, front, fleet, sock, connections):
                await asyncio.wait({fleet.failed, draining}, return_when=asyncio.FIRST_COMPLETED)
                fleet.check()
                failpoint("router.draining")
                drained = asyncio.create_task(fleet.router.drain(settings.grace_seconds))
                await asyncio.wait({fleet.failed, drained, stopping}, return_when=asyncio.FIRST_COMPLETED)
                drained.cancel()
                fleet.router.end_requests()
        fleet.screen.stopping()
    draining.cancel()
    stopping.cancel()


@contextlib.asynccontextmanager
async def _front(
    settings: ServeSettings, front: FrontSettings, fleet: _Fleet, sock: socket.socket, connections: ConnectionLimits
) -> AsyncIterator[None]:
    """The HTTP server, announced on the screen."""
    scripted = settings.engine.kind == "scripted"
    codec = ByteTokenizer() if scripted else Tokenizer.load(Path(settings.engine.model))
    front = replace(front, max_body_values=max(MIN_BODY_VALUES, 2 * fleet.router.model.max_model_len))
    app = create_app(fleet.router, codec, front)
    example = BUILTIN_EXAMPLE if settings.engine.model == str(BUILTIN_MODEL) else PLAIN_EXAMPLE
    async with http_serve(app, sock, limits=connections) as server:
        fleet.screen.ready(server.url, front.served_model_names[0], fleet.router, example)
        yield


@contextlib.asynccontextmanager
async def _fleet(settings: ServeSettings) -> AsyncIterator[_Fleet]:
    """The router, listening on a private socket (and where others may join), and its workers."""
    roles = settings.pools.roles()
    join = settings.join
    key = secrets.token_bytes(KEY_BYTES) if join is None else read_or_create_key(join.key_file)
    with run_directory() as run_dir:
        address = f"unix:{run_dir}/router.sock"
        workers = LocalFleet(_worker_settings(settings, roles, address, key, run_dir))
        screen = Screen(roles)
        awaited = set(roles)
        started = asyncio.Event()

        def on_joined(worker_id: WorkerId) -> None:
            workers.confirm_started(worker_id)
            screen.joined(worker_id)
            awaited.discard(worker_id)
            there = {worker.role for worker in router.workers() if worker.state is WorkerState.READY}
            if not awaited and (join is None or can_serve(there)):
                started.set()

        policy = RouterPolicy(
            Routing(transports=settings.transports),
            settings.http.admission,
            recovery=RecoverySettings(try_paths=True),
        )
        journal = open_journal(_journal_path(settings, "router"))
        callbacks = FleetCallbacks(on_joined=on_joined, on_loading=screen.loading, on_silent=workers.kill)
        router = Router(policy, WallClock(), journal, expected=roles, callbacks=callbacks)
        beating = asyncio.create_task(router.beat())
        tasks: list[asyncio.Task[Any]] = [beating]
        listeners = [await listen(address, key, router.on_channel, messages.FromWorker)]
        try:
            if join is not None:
                listeners.append(await _listen_for_others(join, key, router))
                screen.listening(join.flags(listeners[-1].address))
            workers.start()
            waiting = asyncio.create_task(started.wait())
            failure = asyncio.create_task(_failure(workers, beating))
            tasks += [waiting, failure]
            with screen:
                yield _Fleet(router, workers, screen, waiting, failure)
        finally:
            router.shutdown()
            await workers.stop()
            for listener in listeners:
                await listener.close()
            for task in tasks:
                task.cancel()
            journal.close()


async def _listen_for_others(join: JoinPoint, key: bytes, router: Router) -> Listener:
    address = join.listen_address
    try:
        return await listen(str(address), key, router.on_channel, messages.FromWorker)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else in_words(error)
        raise ConfigError(f"cannot listen at {address}: {reason}; change --listen") from error


def _worker_settings(
    settings: ServeSettings, roles: dict[WorkerId, Role], router: str, key: bytes, run_dir: str
) -> list[WorkerSettings]:
    cuts = [settings.pools.cut(role) for role in roles.values()]
    cpus = place([cut.parallel.world_size for cut in cuts], sorted(os.sched_getaffinity(0)))
    return [
        WorkerSettings(
            worker_id=worker_id,
            role=role,
            epoch=1,
            router=router,
            key=key,
            run_dir=run_dir,
            transports=settings.transports,
            data_host=settings.join.data_host if settings.join else "127.0.0.1",
            tls=settings.join is not None and settings.join.tls,
            engine=cut.of(settings.engine),
            cache=settings.cache,
            batch=settings.batch,
            cpu=cpu,
            grace=settings.grace_seconds,
            journal=_journal_path(settings, worker_id),
        )
        for (worker_id, role), cut, cpu in zip(roles.items(), cuts, cpus, strict=True)
    ]


def _journal_path(settings: ServeSettings, name: str) -> str | None:
    if settings.journal is None:
        return None
    try:
        settings.journal.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--journal {settings.journal}: {in_words(error)}") from error
    return str(settings.journal / f"{name}.jsonl")
