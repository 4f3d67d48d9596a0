"""Arrays and tensors as pages, and pages as arrays: the same bytes, not a copy of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transfer_harness import LAYOUT, NUM_BLOCKS, random_memory

from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.transfer.arrays import as_pages, blocks_as_array, layers_of

SHAPE = (LAYOUT.num_layers, 5, 2, LAYOUT.num_kv_heads, LAYOUT.block_size, LAYOUT.head_dim)
KV = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


@pytest.mark.parametrize(
    "kv",
    [KV, torch.from_numpy(KV), list(KV), dict(enumerate(torch.from_numpy(KV)))],
    ids=["array", "tensor", "list", "dict"],
)
def test_every_form_is_seen_where_it_is(kv: Any) -> None:
    pages = as_pages(kv, LAYOUT)
    assert pages.num_blocks == 5
    assert list(layers_of(pages)) == [0, 1, 2]
    for layer in layers_of(pages):
        assert bytes(pages.layer(layer)) == KV[layer].tobytes()
        assert np.shares_memory(np.frombuffer(pages.layer(layer), np.uint8), KV)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "uint8"])
def test_tensors_of_every_dtype(name: str) -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=2, head_dim=4, dtype=name, block_size=4)
    tensor = torch.arange(64, dtype=torch.float32).reshape(1, 1, 2, 2, 4, 4).to(getattr(torch, name))
    tensor.requires_grad_(tensor.is_floating_point())
    pages = as_pages(tensor, layout)
    assert bytes(pages.layer(0)) == bytes(tensor.detach().view(torch.uint8).numpy())


def test_memory_is_taken_as_it_is() -> None:
    memory = random_memory(1)
    assert as_pages(memory, LAYOUT) is memory
    assert list(layers_of(memory)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("kv", "complaint"),
    [
        (KV[:2], "2 layers"),
        ({3: KV[0]}, "layers"),
        ({}, "layers"),
        (KV.astype(np.float64), "dtype float64"),
        (torch.from_numpy(KV).half(), "dtype float16"),
        (KV.transpose(0, 1, 2, 4, 3, 5), "not contiguous"),
        (KV[:, :, :1], "not contiguous"),
        (KV[..., :3].copy(), "blocks of 256 bytes"),
        ({0: KV[0], 1: KV[1, :4]}, "different numbers"),
        ({0: KV[0, :0]}, "blocks of 256 bytes"),
        (torch.from_numpy(KV).to("meta"), "main memory"),
        (
            random_memory(1, KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32", block_size=4)),
            "pushed as",
        ),
    ],
)
def test_what_does_not_fit_is_refused(kv: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        as_pages(kv, LAYOUT)


@given(st.permutations(range(NUM_BLOCKS)), st.integers(0, NUM_BLOCKS), st.integers(0, 2))
def test_blocks_come_in_their_order(table: list[int], count: int, layer: int) -> None:
    memory = random_memory(2)
    size = LAYOUT.block_bytes
    content = blocks_as_array(memory, layer, table[:count])
    assert content.shape == (count, 2, 2, 4, 4)
    assert content.tobytes() == b"".join(
        memory.layer(layer)[block * size : (block + 1) * size] for block in table[:count]
    )


def test_consecutive_blocks_are_a_view() -> None:
    memory: KVMemory = random_memory(3)
    blocks_as_array(memory, 1, (4, 5, 6))[:] = 0
    assert not any(memory.layer(1)[4 * LAYOUT.block_bytes : 7 * LAYOUT.block_bytes])
