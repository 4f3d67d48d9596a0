"""Composition of `diptych worker`: one worker in this process, which joins a router elsewhere."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from diptych.chaos import failpoints
from diptych.core.errors import ConfigError
from diptych.core.fleet import Role, is_worker_id
from diptych.core.settings import BatchSettings, CacheSettings, CpuSettings, EngineSettings, WorkerSettings
from diptych.engine.threads import thread_environment
from diptych.fleet.placement import place
from diptych.wire.address import TcpAddress, advertised, parse_host_port
from diptych.wire.key_file import read_key
from diptych.worker.joining import Patience, run_joined
from diptych.worker_process import load_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinSettings:
    """Everything `diptych worker` is told, by the part that it concerns.

    `router` is HOST:PORT; `worker_id` None means role and host name; `advertise` None means the address from
    which this machine reaches the router.
    """

    role: Role
    router: str
    key_file: Path
    tls: bool = False
    worker_id: str | None = None
    advertise: str | None = None
    engine: EngineSettings = field(default_factory=EngineSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    patience: Patience = field(default_factory=Patience)
    journal: Path | None = None


def run(settings: JoinSettings) -> None:
    """Serve until told to leave. Raises DiptychError with the reason for any other end."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    [cpu] = place([settings.engine.parallel.world_size], cores)
    os.environ.update(thread_environment(cpu.threads))
    worker = worker_settings(settings, cpu)
    failpoints.arm(worker.worker_id, 1)
    asyncio.run(run_joined(worker, lambda progress: load_engine(worker, progress), settings.patience))


def worker_settings(settings: JoinSettings, cpu: CpuSettings) -> WorkerSettings:
    """What the worker is told. Pages come over TCP only: a new life must not use memory that somebody may have
    mapped in the last one. Raises ConfigError."""
    if settings.advertise is not None:
        advertised(TcpAddress(settings.advertise, 0, settings.tls))
    worker_id = settings.worker_id or f"{settings.role}-{socket.gethostname()}"[:64]
    if not is_worker_id(worker_id):
        raise ConfigError(f"{worker_id!r} cannot be the name of a worker (letters, digits, . _ -); give one with --id")
    return WorkerSettings(
        worker_id=worker_id,
        role=settings.role,
        epoch=0,
        router=str(parse_host_port(settings.router, tls=settings.tls)),
        key=read_key(settings.key_file),
        run_dir="",
        transports=("tcp",),
        data_host=settings.advertise,
        tls=settings.tls,
        engine=settings.engine,
        cache=settings.cache,
        batch=settings.batch,
        cpu=cpu,
        journal=None if settings.journal is None else str(settings.journal),
    )
