"""Shared by the tests of real processes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def short_directory() -> Iterator[Path]:
    """With a short name, since addresses of Unix sockets are short."""
    with tempfile.TemporaryDirectory(prefix="dp-") as name:
        yield Path(name)
