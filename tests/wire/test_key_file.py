"""The file with the fleet's key."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from diptych.core.errors import ConfigError
from diptych.wire.key_file import read_key, read_or_create_key


def test_a_missing_file_is_made_private_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = read_or_create_key(path)
    assert len(key) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_or_create_key(path) == read_key(path) == key
    assert read_or_create_key(tmp_path / "another") != key


def test_white_space_around_a_key_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(b"\n" + b"k" * 32 + b" \r\n")
    assert read_key(path) == b"k" * 32


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_key_that_others_may_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"k" * 32)
    os.chmod(path, mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key(path)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_or_create_key(path)


@pytest.mark.parametrize("content", [b"", b"k" * 31, b"k" * 31 + b"\n", b"k" * 4097])
def test_what_is_no_key_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="32 to 4096"):
        read_key(path)


def test_what_cannot_be_read_or_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_key(tmp_path / "none")
    with pytest.raises(ConfigError, match="No such file"):
        read_or_create_key(tmp_path / "none" / "key")
    with pytest.raises(ConfigError, match="directory"):
        read_key(tmp_path)
