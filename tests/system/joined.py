"""A real `diptych worker` under test, beside the server of `server.py`."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from server import ENVIRONMENT, Server, soon

COMMAND = (sys.executable, "-m", "diptych", "worker")
END_SECONDS = 30.0


def join_point(server: Server) -> str:
    """HOST:PORT where workers may join this server, as it says itself."""
    found = re.search(r"others may join: .* --join (\S+)", "\n".join(server.screen))
    assert found is not None, server.screen
    return found[1]


@contextlib.contextmanager
def joining(log: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """`diptych worker FLAGS` while the context lasts, its standard error in a file; killed in the end."""
    with log.open("a") as errors:
        process = subprocess.Popen(
            (*COMMAND, *flags), stdin=subprocess.DEVNULL, stderr=errors, text=True, env=ENVIRONMENT
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def refused(log: Path, *flags: str) -> str:
    """The last line of a worker that cannot join."""
    with joining(log, *flags) as process:
        assert process.wait(END_SECONDS) == 1
    return log.read_text().splitlines()[-1]


def leave(process: subprocess.Popen[str]) -> None:
    """SIGTERM; it ends in good order."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(END_SECONDS) == 0


def ready(server: Server, worker_id: str, above: int = 0) -> int:
    """Wait for a worker to be ready in a life after `above`; returns its epoch."""

    def epoch() -> int:
        worker = server.fleet().get(worker_id, {})
        return int(worker["epoch"]) if worker.get("state") == "ready" and worker["epoch"] > above else 0

    return soon(epoch, f"{worker_id} is ready", within=END_SECONDS)
