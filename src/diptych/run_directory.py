"""Where a server's sockets and its workers' logs live: a directory of its own, which lasts as long as the process.

A server that was killed leaves its directory behind. The next one of the same user removes it: a lock, which the
kernel lets go of with the process, tells the dead from the living.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diptych.core.errors import ConfigError, in_words

PREFIX = "diptych-"
LOCK = "lock"
SOCKET_PATH_BYTES = 107  # unix(7)
SHORT = "/tmp"
ROOM = 48  # for this directory's name and that of a worker's socket


@contextlib.contextmanager
def run_directory() -> Iterator[str]:
    """A new directory, removed in the end. Where $TMPDIR is too long a path for sockets it is in /tmp.

    Raises ConfigError if it cannot be made."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > SOCKET_PATH_BYTES - ROOM:
        base = SHORT
    _clear(Path(base))
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, dir=base, ignore_cleanup_errors=True))
            stack.callback(os.close, _lock(Path(path)))
        except OSError as error:
            raise ConfigError(f"no directory for sockets in {base}: {in_words(error)}; change $TMPDIR") from error
        yield path


def _lock(directory: Path) -> int:
    """Mark a directory as that of a living process. The lock has its name only once it is held."""
    unnamed = directory / f"{LOCK}.new"
    descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    unnamed.rename(directory / LOCK)
    return descriptor


def _clear(base: Path) -> None:
    """Remove directories of this user's processes that are dead. Whatever has no lock is somebody else's."""
    for lock in base.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):  # somebody else's, or gone by now
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == lock.parent.lstat().st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
