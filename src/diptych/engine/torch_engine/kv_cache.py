"""Blocks as tensors. Row numbers, the only addresses used here, follow `core.kv_layout`:

    [layer][block][K or V][kv_head][slot][head_dim]

A *block row* is one (block, K or V, kv_head): block_size * head_dim contiguous elements.
A *token row* is one slot of a block row: head_dim elements.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.core.kv_layout import KVLayout

Indices = NDArray[np.int64]


def token_rows(layout: KVLayout, blocks: Indices, slots: Indices) -> Indices:
    """Token rows [T * 2 * num_kv_heads] of tokens at (block, slot): per token its keys, then its values."""
    heads = 2 * layout.num_kv_heads
    first = blocks * heads * layout.block_size + slots
    return (first[:, None] + np.arange(heads) * layout.block_size).reshape(-1)


def block_rows(layout: KVLayout, tables: Indices) -> Indices:
    """Block rows of block tables [N, B], in the order [K or V, N, num_kv_heads, B]."""
    heads = layout.num_kv_heads
    kv_heads = np.arange(2 * heads).reshape(2, 1, heads, 1)
    return (tables[None, :, None, :] * (2 * heads) + kv_heads).reshape(-1)


class KVCache:
    """All layers' blocks in one flat tensor of the layout's dtype."""

    def __init__(self, layout: KVLayout, num_blocks: int, storage: Tensor) -> None:
        rows = num_blocks * 2 * layout.num_kv_heads
        self._layout = layout
        self._layers = storage.view(layout.num_layers, rows, layout.block_size * layout.head_dim)
        self._gathered = storage.new_empty(0)

    @property
    def num_layers(self) -> int:
        return self._layout.num_layers

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, num_kv_heads, head_dim] at the tokens' `rows` (from `token_rows`)."""
        tokens = torch.cat((keys, values), dim=1).view(-1, self._layout.head_dim)
        self._layers[layer].view(-1, self._layout.head_dim).index_copy_(0, rows, tokens)

    def copy_blocks(self, layer: int, rows: Tensor, into: Tensor) -> None:
        """Copy `rows` (K or V of `block_rows`) into contiguous memory [num_kv_heads, slots, head_dim]."""
        torch.index_select(self._layers[layer], 0, rows, out=into.view(len(rows), -1))

    def gather(
        self, layer: int, rows: Tensor, num_sequences: int, unused: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values, each [num_sequences * num_kv_heads, slots, head_dim], of `rows` (from `block_rows`).

        `unused` numbers token rows of the result to zero: unused slots hold anything, even NaN, which no
        mask would keep out of a product. The result lies in memory that the next call reuses: fresh
        memory of this size would cost more in page faults than the copy itself.
        """
        width = self._layers.shape[-1]
        size = len(rows) * width
        if self._gathered.numel() < size:
            self._gathered = self._layers.new_empty(size)
        out = self._gathered[:size].view(len(rows), width)
        torch.index_select(self._layers[layer], 0, rows, out=out)
        if unused is not None:
            out.view(-1, self._layout.head_dim).index_fill_(0, unused, 0.0)
        keys, values = out.view(2, num_sequences * self._layout.num_kv_heads, -1, self._layout.head_dim)
        return keys, values
