"""Worker processes on this machine: started, restarted with a new epoch when they die, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from diptych.core.errors import ConfigError, in_words
from diptych.core.fleet import WorkerId
from diptych.core.settings import WorkerSettings
from diptych.engine.threads import thread_environment

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "diptych", "worker-process")
FIRST_BACKOFF, LONGEST_BACKOFF = 0.25, 8.0  # seconds before a restart, doubling while it keeps dying
HEALTHY_AFTER = 30.0  # seconds of life after which the back-off starts over
RESTART_SECONDS = 600.0  # in which a worker that is restarted must be back, its streams moved and its model loaded
GRACE = 5.0  # seconds between the request to end and SIGKILL


class LocalFleet:
    """Runs one process per WorkerSettings until `stop`. `failed` is set if a worker cannot even start."""

    def __init__(self, workers: Sequence[WorkerSettings]) -> None:
        self._settings = {worker.worker_id: worker for worker in workers}
        self._processes: dict[WorkerId, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._started: set[WorkerId] = set()
        self._registered: dict[WorkerId, asyncio.Event] = {}
        self._restarts: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self.failed: asyncio.Future[ConfigError] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        """Start every worker's process and its supervision."""
        self._tasks = [asyncio.create_task(self._supervise(worker_id)) for worker_id in self._settings]

    def confirm_started(self, worker_id: WorkerId) -> None:
        """The worker has registered: from now on its death is an accident and not a wrong flag."""
        self._started.add(worker_id)
        self._registered.setdefault(worker_id, asyncio.Event()).set()

    def restart_each(self) -> None:
        """Restart all workers, one after another: each leaves in good order, and the next one waits until it has
        registered again. Does nothing while that is under way already."""
        if self._restarts is None or self._restarts.done():
            self._restarts = asyncio.create_task(self._restart_each())

    async def _restart_each(self) -> None:
        for worker_id in self._settings:
            log.warning("restarting worker %s", worker_id)
            registered = self._registered[worker_id] = asyncio.Event()
            self._signal(worker_id, signal.SIGTERM)
            try:
                async with asyncio.timeout(RESTART_SECONDS):
                    await registered.wait()
            except TimeoutError:
                log.error("worker %s is not back after %.0f s; the others stay as they are", worker_id, RESTART_SECONDS)
                return
        log.warning("all workers have been restarted")

    def kill(self, worker_id: WorkerId) -> None:
        """End a worker that has fallen silent, so that it can be restarted and its memory is sure to be its own."""
        self._signal(worker_id, signal.SIGKILL)

    def _signal(self, worker_id: WorkerId, signum: signal.Signals) -> None:
        process = self._processes.get(worker_id)
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signum)

    async def stop(self) -> None:
        """End every process: ask, then insist."""
        self._stopping.set()
        if self._restarts is not None:
            self._restarts.cancel()
        for worker_id in self._processes:
            self._signal(worker_id, signal.SIGTERM)
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=GRACE)
            for worker_id in self._processes:
                self.kill(worker_id)
            if late:
                await asyncio.wait(late)

    async def _supervise(self, worker_id: WorkerId) -> None:
        backoff = FIRST_BACKOFF
        clock = asyncio.get_running_loop().time
        while not self._stopping.is_set():
            started = clock()
            try:
                code = await self._run(worker_id)
            except OSError as error:  # no process or descriptor to be had: perhaps later
                log.error("worker %s cannot be started: %s", worker_id, in_words(error))
                code = os.EX_OSERR
            if self._stopping.is_set():
                return
            if worker_id not in self._started:
                self._give_up(worker_id, code)
                return
            if code != 0:  # 0: it has left in good order
                backoff = FIRST_BACKOFF if clock() - started > HEALTHY_AFTER else min(2 * backoff, LONGEST_BACKOFF)
                log.warning("worker %s ended (%s); restarting it in %.2f s", worker_id, _how(code), backoff)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(backoff):
                        await self._stopping.wait()
            settings = self._settings[worker_id]
            self._settings[worker_id] = replace(settings, epoch=settings.epoch + 1)

    async def _run(self, worker_id: WorkerId) -> int:
        """One life of one worker; returns its exit status."""
        settings = self._settings[worker_id]
        with self._log_path(worker_id).open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                stdin=asyncio.subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                env={**os.environ, **thread_environment(settings.cpu.threads)},
                start_new_session=True,  # a terminal's Ctrl-C is for the parent, which ends its workers itself
            )
        self._processes[worker_id] = process
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await process.communicate(msgspec.json.encode(settings))
        return await process.wait()

    def _give_up(self, worker_id: WorkerId, code: int) -> None:
        path = self._log_path(worker_id)
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        reason = lines[-1].removeprefix("diptych: ") if lines else _how(code)
        if not self.failed.done():
            self.failed.set_result(
                ConfigError(f"worker {worker_id} did not start: {reason}", code="worker_start_failed")
            )

    def _log_path(self, worker_id: WorkerId) -> Path:
        return Path(self._settings[worker_id].run_dir) / f"{worker_id}.log"


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
