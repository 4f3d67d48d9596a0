from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.kv_layout import DTYPE_BYTES, KVLayout, KVMemory

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


@pytest.mark.parametrize("field", [field.name for field in fields(KVLayout) if field.name != "dtype"])
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
