"""A `diptych serve` of its own for each measurement: launched, awaited, ended, and checked to be gone."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from diptych.bench import processes
from diptych.bench.processes import ProcessStat

HOST = "127.0.0.1"
START_TIMEOUT = 120.0  # seconds until /ready
STOP_TIMEOUT = 20.0  # seconds from SIGINT until every process is gone
LOOK_EVERY = 0.1  # seconds; nothing is measured while we look
LOG_LINES = 20


class ServerError(Exception):
    """The server did not start, died, or left processes behind."""


@dataclass(frozen=True, slots=True)
class System:
    """A set-up to measure: its name in the report, and the flags of `diptych serve` that make it."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunningServer:
    url: str
    pid: int

    def processes(self) -> dict[int, ProcessStat]:
        """All processes of this server, as they are now."""
        return processes.tree(self.pid)


@contextlib.contextmanager
def diptych_server(model: Path, system: System, served_name: str) -> Iterator[RunningServer]:
    """Serve `model` with the flags of `system` while the context lasts. Raises ServerError."""
    port = free_port()
    flags = ("--host", HOST, "--port", str(port), "--served-model-name", served_name, *system.flags)
    command = (sys.executable, "-m", "diptych", "serve", str(model), *flags)
    with running(command, f"http://{HOST}:{port}") as server:
        yield server


@contextlib.contextmanager
def running(command: Sequence[str], url: str) -> Iterator[RunningServer]:
    """Run `command` until the context ends; it must answer 200 at `url`/ready.

    Raises:
        ServerError: it does not come up (with the end of what it printed), it dies inside the context, or
            one of its processes outlives it (which is then killed).
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        family: dict[int, ProcessStat] = {}
        try:
            _await_ready(process, url, log)
            family |= processes.tree(process.pid)
            yield RunningServer(url, process.pid)
            if process.poll() is not None:
                raise ServerError(f"the server died ({process.returncode}):\n{_tail(log)}")
        finally:
            _end(process, family)


def free_port() -> int:
    """A port that was free a moment ago. Not one of those that Linux gives to whoever asks for any (from 32768 on), so
    that other processes of a benchmark do not get it meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


def _await_ready(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not _is_ready(url):
        if process.poll() is not None:
            raise ServerError(f"the server did not start ({process.returncode}):\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"the server was not ready after {START_TIMEOUT:.0f} s:\n{_tail(log)}")
        time.sleep(LOOK_EVERY)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes], family: dict[int, ProcessStat]) -> None:
    """Interrupt it as Ctrl-C does, and see to it that nothing is left: neither of the processes that it has
    now, nor of the `family` that it had once. Raises ServerError if that took force."""
    family = family | processes.tree(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + STOP_TIMEOUT
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT)
    while (left := processes.still_alive(family)) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    if left:
        raise ServerError(f"{len(left)} processes outlived the server by {STOP_TIMEOUT:.0f} s and were killed")


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_LINES:])
