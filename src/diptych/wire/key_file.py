"""The file that holds a fleet's key: the same content on every host, readable by its owner only."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from diptych.core.errors import ConfigError

MIN_BYTES = 32
MAX_BYTES = 4096


def read_key(path: Path) -> bytes:
    """The key in a file (white space at its ends does not count).

    Raises ConfigError if it is missing, too short to be a secret, or somebody else may read it."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--key-file {path}: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(f"--key-file {path} can be read by others; run: chmod 600 {path}")
    key = content.strip()
    if not MIN_BYTES <= len(key) <= MAX_BYTES:
        raise ConfigError(f"--key-file {path} holds {len(key)} bytes; a key has {MIN_BYTES} to {MAX_BYTES}")
    return key


def check_key(key: bytes) -> None:
    """Raises ConfigError if a key is too short to be a secret."""
    if len(key) < MIN_BYTES:
        raise ConfigError(f"a fleet's key of {len(key)} bytes; it has at least {MIN_BYTES}")


def read_or_create_key(path: Path) -> bytes:
    """As `read_key`; a file that is not there is made, with a fresh key in hexadecimal."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_key(path)
    except OSError as error:
        raise ConfigError(f"--key-file {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(MIN_BYTES) + "\n")
    return read_key(path)
