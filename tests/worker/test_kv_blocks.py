"""How many KV blocks a worker takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diptych.core.errors import ConfigError
from diptych.core.fleet import Role
from diptych.core.kv_layout import KVLayout
from diptych.core.settings import CacheSettings, WorkerSettings
from diptych.worker import main

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, dtype="float32", block_size=16)


def blocks(layout: KVLayout, kv_tokens: int | None = None, longest: int = 100) -> int:
    settings = WorkerSettings(
        worker_id="w",
        role=Role.MIXED,
        epoch=1,
        router="",
        key=b"",
        run_dir="",
        cache=CacheSettings(kv_tokens=kv_tokens),
    )
    return main.kv_blocks(settings, layout, longest)


def test_tokens_are_shared_evenly_among_data_parallel_ranks() -> None:
    assert blocks(LAYOUT, 4000) == 250
    assert blocks(replace(LAYOUT, tensor_parallel=2), 4000) == 250
    assert blocks(replace(LAYOUT, data_parallel=4), 4000) == 63
    assert blocks(replace(LAYOUT, data_parallel=4, block_size=32), 4000) == 32


def test_by_default_there_is_room_for_some_long_requests_if_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    enough = 16 * 1600 * LAYOUT.token_bytes
    monkeypatch.setattr(main, "available_memory", lambda: 4 * enough)
    assert blocks(LAYOUT, longest=1600) == 1600
    assert blocks(replace(LAYOUT, data_parallel=4), longest=1600) == 400
    assert blocks(replace(LAYOUT, data_parallel=32), longest=160) == 10
    with_copies = replace(LAYOUT, tensor_parallel=8)
    assert with_copies.replication == 4
    assert blocks(with_copies, longest=1600) == 400


def test_every_data_parallel_rank_must_hold_the_longest_request() -> None:
    assert blocks(replace(LAYOUT, data_parallel=4), 400) == 7
    with pytest.raises(ConfigError, match="99 tokens of KV cache on each of 4 data-parallel ranks cannot hold"):
        blocks(replace(LAYOUT, data_parallel=4), 399)
    with pytest.raises(ConfigError, match="99 tokens of KV cache cannot hold one request of 100"):
        blocks(LAYOUT, 99)
