from __future__ import annotations

from collections import Counter
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.kv_layout import DTYPE_BYTES, KVLayout, KVMemory, SequenceKV

layouts = st.builds(
    KVLayout,
    num_layers=st.integers(1, 5),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 9),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    block_size=st.integers(1, 9),
)
LLAMA_3_8B = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_size=16)


def test_known_model() -> None:
    """128 KiB per token: 2 (K, V) x 32 layers x 8 heads x 128 dims x 2 bytes."""
    assert LLAMA_3_8B.token_bytes == 131072
    assert LLAMA_3_8B.block_bytes == 65536


@given(layout=layouts)
def test_a_block_of_all_layers_is_its_tokens(layout: KVLayout) -> None:
    assert layout.block_bytes * layout.num_layers == layout.token_bytes * layout.block_size


@given(layout=layouts, num_blocks=st.integers(1, 4))
def test_layers_cover_the_memory_without_overlap(layout: KVLayout, num_blocks: int) -> None:
    buffer = bytearray(layout.num_layers * num_blocks * layout.block_bytes)
    memory = KVMemory(layout, num_blocks, memoryview(buffer))
    for layer in range(layout.num_layers):
        view = memory.layer(layer)
        assert view.nbytes == num_blocks * layout.block_bytes
        assert not any(view)
        view[:] = bytes([layer + 1]) * view.nbytes
    assert buffer == b"".join(
        bytes([layer + 1]) * (num_blocks * layout.block_bytes) for layer in range(layout.num_layers)
    )


@pytest.mark.parametrize("size", [0, 255, 257])
def test_memory_must_have_the_layouts_size(size: int) -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, dtype="uint8", block_size=16)
    with pytest.raises(ValueError, match=f"KV buffer has {size} bytes, the layout wants 256"):
        KVMemory(layout, 1, memoryview(bytearray(size)))


SIZES = [field.name for field in fields(KVLayout) if field.name not in ("dtype", "latent_dim")]


@pytest.mark.parametrize("field", SIZES)
def test_every_size_counts(field: str) -> None:
    sizes = asdict(LLAMA_3_8B)
    assert KVLayout(**{**sizes, field: sizes[field] + 1}).digest != LLAMA_3_8B.digest
    with pytest.raises(ValueError, match="at least 1"):
        KVLayout(**{**sizes, field: 0})


def test_dtype_counts() -> None:
    assert replace(LLAMA_3_8B, dtype="float16").digest != LLAMA_3_8B.digest
    with pytest.raises(ValueError, match="unknown KV dtype 'float8'"):
        replace(LLAMA_3_8B, dtype="float8")


def test_equal_layouts_have_equal_digests() -> None:
    assert replace(LLAMA_3_8B).digest == LLAMA_3_8B.digest


@st.composite
def cuts(draw: st.DrawFn) -> KVLayout:
    heads, share, copies = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    num_layers = draw(st.integers(1, 9))
    return KVLayout(
        num_layers=num_layers,
        num_kv_heads=heads * share,
        head_dim=4,
        dtype="float16",
        block_size=16,
        tensor_parallel=heads * (copies if share == 1 else 1),
        pipeline_parallel=draw(st.integers(1, num_layers)),
        data_parallel=draw(st.integers(1, 3)),
    )


@given(cuts())
def test_ranks_of_a_sequence_hold_everything_equally_often(layout: KVLayout) -> None:
    per_data_rank = layout.world_size // layout.data_parallel
    for data_rank in range(layout.data_parallel):
        ranks = range(data_rank * per_data_rank, (data_rank + 1) * per_data_rank)
        held = Counter(
            (layer, head) for rank in ranks for layer in layout.layers_of(rank) for head in layout.heads_of(rank)
        )
        assert held.keys() == {
            (layer, head) for layer in range(layout.num_layers) for head in range(layout.num_kv_heads)
        }
        assert set(held.values()) == {layout.replication}


@given(cuts())
def test_coordinates_and_holdings_agree(layout: KVLayout) -> None:
    ranks = [
        layout.rank(data_rank, stage, tensor_rank)
        for data_rank in range(layout.data_parallel)
        for stage in range(layout.pipeline_parallel)
        for tensor_rank in range(layout.tensor_parallel)
    ]
    assert ranks == list(range(layout.world_size))
    for layer in range(layout.num_layers):
        rank = layout.rank(0, layout.stage_of(layer), 0)
        assert layer in layout.layers_of(rank)
    sizes = [len(layout.layers_of(layout.rank(0, stage, 0))) for stage in range(layout.pipeline_parallel)]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_known_cuts() -> None:
    eight = replace(LLAMA_3_8B, tensor_parallel=4, pipeline_parallel=3, data_parallel=2)
    assert (eight.world_size, eight.replication, eight.block_bytes) == (24, 1, 65536 // 4)
    assert [eight.layers_of(rank) for rank in (0, 4, 8, 12)] == [range(11), range(11, 22), range(22, 32), range(11)]
    assert [eight.heads_of(rank) for rank in (0, 1, 3, 5)] == [range(2), range(2, 4), range(6, 8), range(2, 4)]
    many = replace(LLAMA_3_8B, tensor_parallel=16)
    assert (many.replication, many.heads_per_rank) == (2, 1)
    assert [many.heads_of(rank) for rank in (0, 1, 2, 15)] == [range(1), range(1), range(1, 2), range(7, 8)]
    assert many.token_bytes == LLAMA_3_8B.token_bytes


def test_latents_are_one_vector_on_every_tensor_rank() -> None:
    """DeepSeek-V3: 512 + 64 elements, 1,152 bytes per token and layer."""
    mla = KVLayout(num_layers=61, latent_dim=576, dtype="bfloat16", block_size=64, tensor_parallel=8)
    assert (mla.token_bytes, mla.block_bytes, mla.replication) == (61 * 1152, 64 * 1152, 8)
    assert {mla.heads_of(rank) for rank in range(8)} == {range(1)}
    with pytest.raises(ValueError, match="heads or latents, not both"):
        replace(LLAMA_3_8B, latent_dim=576)


@pytest.mark.parametrize(
    ("cut", "complaint"),
    [
        ({"tensor_parallel": 3}, "8 KV heads cannot be cut evenly for 3 tensor ranks"),
        ({"tensor_parallel": 12}, "8 KV heads cannot be cut evenly for 12 tensor ranks"),
        ({"pipeline_parallel": 33}, "32 layers are too few for 33 pipeline stages"),
    ],
)
def test_uneven_cuts_are_refused(cut: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(LLAMA_3_8B, **cut)


def test_ranks_and_layers_that_do_not_exist_are_refused() -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=1, head_dim=4, dtype="uint8", block_size=2, pipeline_parallel=2)
    memory = KVMemory(layout, 1, memoryview(bytearray(range(16))), rank=1)
    assert memory.layer(2) == bytes(range(16))
    with pytest.raises(ValueError, match="rank 1 holds layers 2 to 2, not 1"):
        memory.layer(1)
    with pytest.raises(ValueError, match="no rank 2 among 2"):
        KVMemory(layout, 1, memoryview(bytearray(16)), rank=2)
    with pytest.raises(ValueError, match="no data-parallel rank 1 among 1"):
        SequenceKV(layout, [0], data_rank=1)


def test_heads_and_latents_exclude_each_other() -> None:
    for sizes in ({"num_kv_heads": 1}, {"head_dim": 8}):
        with pytest.raises(ValueError, match="heads or latents"):
            KVLayout(num_layers=1, latent_dim=4, dtype="uint8", block_size=1, **sizes)


def test_a_cut_in_short() -> None:
    assert LLAMA_3_8B.cut == ""
    assert replace(LLAMA_3_8B, tensor_parallel=2).cut == "tp2"
    assert replace(LLAMA_3_8B, pipeline_parallel=4, data_parallel=2, expert_parallel=2).cut == "pp4 dp2 ep2"
