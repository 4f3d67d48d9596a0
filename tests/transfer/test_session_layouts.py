"""Public sessions between different cuts of one model: each rank pulls what it would have computed itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from diptych.core.blocks import blocks_for
from diptych.core.errors import TransferError
from diptych.core.kv_layout import KVLayout
from diptych.transfer.session import KVSource, KVTarget, PulledSession, SourceSession

KEY = b"k" * 32
SECONDS = 20
NUM_TOKENS = 41
MODEL = KVLayout(num_layers=4, num_kv_heads=4, head_dim=3, dtype="float32", block_size=8)
LAYOUTS = {
    "TP 2 -> 1": (replace(MODEL, tensor_parallel=2), MODEL),
    "TP 1 -> 4, block 8 -> 16": (MODEL, replace(MODEL, tensor_parallel=4, block_size=16)),
    "TP 8 -> 2, block 16 -> 8": (replace(MODEL, tensor_parallel=8, block_size=16), replace(MODEL, tensor_parallel=2)),
    "PP 2 -> TP 2": (replace(MODEL, pipeline_parallel=2), replace(MODEL, tensor_parallel=2)),
    "TP 4 -> DP 4": (replace(MODEL, tensor_parallel=4), replace(MODEL, data_parallel=4)),
    "DP 2, TP 2 -> PP 3": (replace(MODEL, data_parallel=2, tensor_parallel=2), replace(MODEL, pipeline_parallel=3)),
}
Array = npt.NDArray[Any]
KV = np.random.default_rng(3).random((4, 2, 4, NUM_TOKENS, 3), dtype=np.float32)  # [layer, K or V, head, token, dim]


def ranks_of(layout: KVLayout, data_rank: int) -> list[dict[int, Array]]:
    """What each rank of a data-parallel rank has: by layer, [block, K or V, head, slot, dim]."""
    size, count = layout.block_size, blocks_for(NUM_TOKENS, layout.block_size)
    padded = np.zeros((*KV.shape[:3], count * size, KV.shape[4]), KV.dtype)
    padded[:, :, :, :NUM_TOKENS] = KV
    paged = np.moveaxis(padded.reshape(*KV.shape[:3], count, size, KV.shape[4]), 3, 1)
    first = layout.rank(data_rank, 0, 0)
    ranks = range(first, first + layout.pipeline_parallel * layout.tensor_parallel)
    return [
        {
            layer: paged[layer, :, :, layout.heads_of(rank).start : layout.heads_of(rank).stop].copy()
            for layer in layout.layers_of(rank)
        }
        for rank in ranks
    ]


def assert_whole(pulled: PulledSession, layout: KVLayout) -> None:
    for layer in range(layout.num_layers):
        for tensor_rank in range(layout.tensor_parallel):
            heads = layout.heads_of(layout.rank(0, 0, tensor_rank))
            tokens = np.concatenate(list(pulled.layer(layer, tensor_rank)), axis=2)[:, :, :NUM_TOKENS]
            assert np.array_equal(tokens, KV[layer, :, heads.start : heads.stop])


@pytest.fixture(params=LAYOUTS)
def layouts(request: pytest.FixtureRequest) -> tuple[KVLayout, KVLayout]:
    return LAYOUTS[request.param]


@pytest.fixture(params=["shm", "tcp", "local"])
def pair(request: pytest.FixtureRequest, layouts: Any, tmp_path: Path) -> Iterator[tuple[KVSource, KVTarget]]:
    address = {"shm": f"unix:{tmp_path}/kv", "tcp": "tcp:127.0.0.1:0", "local": None}[request.param]
    with KVTarget(layouts[1], 8, key=KEY, address=address) as target, KVSource(key=KEY) as source:
        yield source, target


def open_session(source: KVSource, target: KVTarget, layout: KVLayout, **options: Any) -> SourceSession:
    ticket = target.expect("s", NUM_TOKENS, data_rank=target.layout.data_parallel - 1, **options)
    return source.create_session("s", layout, ticket, target.address or target, data_rank=layout.data_parallel - 1)


def given(ranks: list[dict[int, Array]]) -> Any:
    return ranks[0] if len(ranks) == 1 else ranks


def test_everything_at_once(pair: tuple[KVSource, KVTarget], layouts: tuple[KVLayout, KVLayout]) -> None:
    source, target = pair
    ours, theirs = layouts
    with open_session(source, target, ours) as session:
        session.push(given(ranks_of(ours, ours.data_parallel - 1)), theirs)
        session.close(7)
        session.wait(SECONDS)
    assert_whole(target.pull("s", SECONDS), theirs)
    target.release("s")


def test_layer_by_layer_and_chunk_by_chunk(pair: tuple[KVSource, KVTarget], layouts: tuple[KVLayout, KVLayout]) -> None:
    source, target = pair
    ours, theirs = layouts
    ranks = ranks_of(ours, ours.data_parallel - 1)
    cut = 16 // ours.block_size
    with open_session(source, target, ours) as session:
        for blocks in (session.missing[cut:], session.missing[:cut]):
            for layer in reversed(range(ours.num_layers)):
                held: Any = [{layer: rank[layer]} if layer in rank else None for rank in ranks]
                session.push(held[0] if len(held) == 1 else held, blocks=blocks, first_block=blocks.start)
        session.close(7)
        session.wait(SECONDS)
    assert_whole(target.pull("s", SECONDS), theirs)


def test_a_prefix_that_ends_inside_a_block_of_the_source() -> None:
    ours, theirs = replace(MODEL, tensor_parallel=2, block_size=16), MODEL
    with KVTarget(theirs, 16, key=KEY) as target, KVSource(key=KEY) as source:
        present = target._pools[0].allocate(1)
        with open_session(source, target, ours, present=present) as session:
            assert session.missing_tokens == range(8, NUM_TOKENS)
            assert session.missing == range(3)
            session.push(ranks_of(ours, 0))
            session.close(7)
            session.wait(SECONDS)
        pulled = target.pull("s", SECONDS)
        assert not pulled.layer(0)[0].any()
        tokens = np.concatenate(list(pulled.layer(0)), axis=2)[:, :, 8:NUM_TOKENS]
        assert np.array_equal(tokens, KV[0][:, :, 8:])


def test_misuse_is_refused() -> None:
    ours, theirs = replace(MODEL, tensor_parallel=2), replace(MODEL, block_size=16)
    ranks: list[Any] = ranks_of(ours, 0)
    with KVTarget(theirs, 8, key=KEY) as target, KVSource(key=KEY) as source:
        session = open_session(source, target, ours)
        with pytest.raises(ValueError, match="KV of 1 ranks"):
            session.push(ranks[:1])
        with pytest.raises(ValueError, match="not on every rank"):
            session.push([ranks[0], None])
        with pytest.raises(ValueError, match="blocks"):
            session.push([ranks[0], {layer: kv[:3] for layer, kv in ranks[1].items()}])
        with pytest.raises(ValueError, match="multiples of 16 tokens"):
            session.push(ranks, blocks=[0, 1, 2], first_block=0)
        with pytest.raises(ValueError, match="another layout"):
            session.push(ranks, MODEL)
        session.push(ranks, layers=[0, 1, 3])
        session.close(7)
        with pytest.raises(TransferError, match="before all pages"):
            session.wait(SECONDS)
