"""What a worker is told is checked before it starts."""

from __future__ import annotations

import pytest

from diptych.core.errors import ConfigError
from diptych.core.fleet import Role
from diptych.core.settings import MAX_STREAMS, WorkerSettings


def settings(num_streams: int) -> WorkerSettings:
    return WorkerSettings(
        worker_id="w", role=Role.MIXED, epoch=1, router="unix:/r", key=b"k", run_dir="/", num_streams=num_streams
    )


def test_a_link_has_as_many_connections_as_a_target_serves() -> None:
    assert settings(MAX_STREAMS).num_streams == MAX_STREAMS
    for wrong in (0, MAX_STREAMS + 1):
        with pytest.raises(ConfigError, match="connections"):
            settings(wrong)
