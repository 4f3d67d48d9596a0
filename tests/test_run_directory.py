"""The directory of a server: gone with it, or with the next one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from diptych.core.errors import ConfigError
from diptych.run_directory import run_directory

# Says where its directory is, and waits to be killed.
HOLDER = """
import sys
from diptych.run_directory import run_directory
with run_directory() as path:
    print(path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty place for temporary files, with a short name."""
    with tempfile.TemporaryDirectory(prefix="dp-") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


def holder(base: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(base)},
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_is_private_and_ends_with_its_server(base: Path) -> None:
    with run_directory() as path:
        assert Path(path).parent == base
        assert Path(path).stat().st_mode & 0o077 == 0
    assert list(base.iterdir()) == []


@pytest.mark.fault(33)
def test_what_a_killed_server_left_behind_goes_at_the_next_start(base: Path) -> None:
    killed, left = holder(base)
    alive, kept = holder(base)
    somebody = base / "diptych-no-lock"
    somebody.mkdir()
    killed.kill()
    killed.wait()
    assert left.exists()
    with run_directory() as path:
        assert sorted(base.iterdir()) == sorted([kept, somebody, Path(path)])
    alive.communicate()
    assert alive.returncode == 0
    assert list(base.iterdir()) == [somebody]
    assert killed.stdin is not None
    assert killed.stdout is not None
    killed.stdin.close()
    killed.stdout.close()


def test_where_paths_are_too_long_for_sockets_it_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with run_directory() as path:
        assert path.startswith("/tmp/diptych-")
    assert not Path(path).exists()


def test_a_directory_that_cannot_be_made_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/place")
    with pytest.raises(ConfigError, match=r"/no/such/place: No such file or directory; change \$TMPDIR"):
        run_directory().__enter__()
