"""Composition of one worker process: an engine, KV memory, transports, and the worker around them."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import time

from diptych.chaos import failpoints
from diptych.core.errors import ConfigError
from diptych.core.ports import Engine
from diptych.core.settings import CpuSettings, EngineSettings, WorkerSettings
from diptych.worker.main import End, OnProgress, run_worker

ENDING_SECONDS = 1.0


def run(settings: WorkerSettings) -> None:
    """Serve until told to end. Raises DiptychError if it cannot start."""
    failpoints.arm(settings.worker_id, settings.epoch)
    if settings.cpu.cores:
        os.sched_setaffinity(0, settings.cpu.cores)
    router = os.pidfd_open(os.getppid())
    end = asyncio.run(run_worker(settings, lambda progress: load_engine(settings, progress)))
    if end is End.ROUTER_GONE and _has_ended(router):  # killed: it can clear up nothing
        shutil.rmtree(settings.run_dir, ignore_errors=True)


def _has_ended(pidfd: int) -> bool:
    """Whether a process has ended, or does so in a moment (its connections close a little before)."""
    return bool(select.select([pidfd], [], [], ENDING_SECONDS)[0])


def load_engine(settings: WorkerSettings, on_progress: OnProgress) -> Engine:
    """Build the engine that the settings name. Blocking; heavy imports happen here."""
    match settings.engine.kind:
        case "torch":
            return _load_torch(settings.engine, settings.cpu, on_progress)
        case "scripted":
            return _load_scripted(settings.engine)
        case other:
            raise ConfigError(f"--engine {other}: one of torch, scripted")


def _load_torch(engine: EngineSettings, cpu: CpuSettings, on_progress: OnProgress) -> Engine:
    """One rank computes in this process, several in processes of their own."""
    if engine.parallel.world_size > 1:
        from diptych.engine.torch_engine.parallel_engine import ParallelEngine

        return ParallelEngine.load(engine, cpu.cores, on_progress)

    import torch

    from diptych.engine.torch_engine.runner import TorchEngine

    torch.set_num_threads(cpu.threads)
    return TorchEngine.load(
        engine.model,
        device=engine.device,
        dtype=engine.dtype,
        block_size=engine.block_size,
        max_model_len=engine.max_model_len,
        on_progress=on_progress,
    )


def _load_scripted(engine: EngineSettings) -> Engine:
    from diptych.engine.scripted import ScriptedEngine, ScriptedModel

    model = ScriptedModel(
        block_size=engine.block_size, max_model_len=engine.max_model_len or 4096, parallel=engine.parallel
    )
    try:
        return ScriptedEngine(model, sleep=time.sleep)
    except ValueError as error:
        raise ConfigError(str(error)) from error
