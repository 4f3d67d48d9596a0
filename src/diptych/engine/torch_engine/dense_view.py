"""The contexts of decoding sequences, kept side by side from step to step.

Attention wants each context in one piece, the cache holds it in scattered blocks, and gathering them
anew in every step costs as much as attending. So a sequence that decodes gets a *slot* in a dense
buffer: filled from its blocks once, then lengthened by one token a step. Blocks stay the truth; all of
this can be dropped at any time.

Slots of one buffer have one capacity, and sequences attend together with those of their buffer. The
capacities 64, 96, 128, 192, 256, ... keep padding, of products and of memory, below half.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diptych.core.blocks import BlockId, blocks_for
from diptych.core.kv_layout import KVLayout
from diptych.core.sequence import ScheduledSequence, Sequence
from diptych.engine.torch_engine.kv_cache import Indices, KVCache, block_rows

MIN_CAPACITY = 64


def capacity_for(num_tokens: int) -> int:
    """The smallest power of two, or three quarters of one, that holds `num_tokens` (and MIN_CAPACITY)."""
    power: int = 1 << (max(num_tokens, MIN_CAPACITY) - 1).bit_length()
    smaller = power // 4 * 3
    return smaller if max(num_tokens, MIN_CAPACITY) <= smaller else power


@dataclass(frozen=True, slots=True)
class Resident:
    """What a slot holds: the KV of a sequence's first `end` tokens, which then lay in `blocks`."""

    slot: int
    end: int
    blocks: list[BlockId]

    def continues(self, row: ScheduledSequence) -> bool:
        """Whether everything before `row` is here. A repeated step finds its own token here already.

        A sequence that was preempted and came back has other blocks, or the same KV in the same ones.
        """
        in_place = row.sequence.block_table[: len(self.blocks)] == self.blocks
        return in_place and row.start in (self.end - 1, self.end)


class DenseBuffer:
    """Slots of one capacity: `kv` is [layer][K or V][slot][kv_head][position][head_dim].

    `residents` are those that took part in the latest step; their values past the end are zero.
    """

    def __init__(self, layout: KVLayout, num_slots: int, capacity: int, like: Tensor) -> None:
        self.kv = like.new_empty(layout.num_layers, 2, num_slots, layout.num_kv_heads, capacity, layout.head_dim)
        self.residents: dict[Sequence, Resident] = {}

    @property
    def num_slots(self) -> int:
        return self.kv.shape[2]


@dataclass(frozen=True, slots=True)
class Fill:
    """A slot to be filled from `gather`, the block rows of `end` tokens."""

    slot: int
    end: int
    gather: Tensor


@dataclass(frozen=True, slots=True)
class DenseContexts:
    """The contexts of `rows`, which sit in the first slots of `buffer`, one after the other."""

    rows: list[ScheduledSequence]
    buffer: DenseBuffer
    fills: tuple[Fill, ...]
    appends: Tensor  # token rows of one layer of the buffer: per row its keys, then its values
    num_slots: int  # positions to attend to, padding included

    def load(self, cache: KVCache, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `plan.Contexts`."""
        kv = self.buffer.kv[layer]
        for fill in self.fills:
            stored = cache.gather(layer, fill.gather, 1)
            for into, blocks in zip(kv[:, fill.slot], stored, strict=True):
                into[:, : blocks.shape[1]] = blocks[:, : into.shape[1]]
            # No mask would keep a NaN among the values out of a product.
            kv[1, fill.slot, :, fill.end :] = 0
        tokens = torch.cat((keys, values), dim=1).view(-1, kv.shape[-1])
        kv.view(-1, kv.shape[-1]).index_copy_(0, self.appends, tokens)
        dense_keys, dense_values = kv[:, : len(self.rows), :, : self.num_slots].flatten(1, 2)
        return dense_keys, dense_values

    def keep(self) -> None:
        """The step has computed all layers: its rows' slots are good for the next."""
        for slot, row in enumerate(self.rows):
            self.buffer.residents[row.sequence] = Resident(slot, row.end, list(row.sequence.block_table))


class DenseView:
    """All dense buffers of an engine: at most `limit` bytes, on top of the cache's blocks."""

    def __init__(self, layout: KVLayout, like: Tensor, limit: int) -> None:
        self._layout = layout
        self._like = like
        self._limit = limit
        self._buffers: dict[int, DenseBuffer] = {}  # by capacity

    def place(self, rows: Rows[ScheduledSequence]) -> tuple[list[DenseContexts], list[ScheduledSequence]]:
        """Give slots to rows of one token each; also returns the rows for which there is no memory.

        Slots count as empty until `keep`, so a step that fails half-way leaves nothing half-written.
        """
        by_capacity: dict[int, list[ScheduledSequence]] = {}
        for row in rows:
            by_capacity.setdefault(capacity_for(row.end), []).append(row)
        for capacity in self._buffers.keys() - by_capacity.keys():
            del self._buffers[capacity]
        placed: list[DenseContexts] = []
        homeless: list[ScheduledSequence] = []
        for capacity, members in sorted(by_capacity.items()):
            if self._reserve(capacity, len(members)):
                placed.append(self._place(members, self._buffers[capacity]))
            else:
                homeless += members
        return placed, homeless

    def forget(self, request_id: str) -> None:
        """Let go of a sequence, and of buffers that hold no other."""
        for capacity, buffer in list(self._buffers.items()):
            for sequence in [each for each in buffer.residents if each.request_id == request_id]:
                del buffer.residents[sequence]
            if not buffer.residents:
                del self._buffers[capacity]

    def _reserve(self, capacity: int, num_slots: int) -> bool:
        """Have that many slots, and some to grow into if there is memory. What grows starts empty."""
        buffer = self._buffers.pop(capacity, None)
        if buffer is None or buffer.num_slots < num_slots:
            del buffer
            spare = self._limit - sum(each.kv.nbytes for each in self._buffers.values())
            affordable = spare // (capacity * self._layout.token_bytes)
            if affordable < num_slots:
                return False
            num_slots = min(num_slots + num_slots // 2, affordable)
            buffer = DenseBuffer(self._layout, num_slots, capacity, self._like)
        self._buffers[capacity] = buffer
        return True

    def _place(self, members: list[ScheduledSequence], buffer: DenseBuffer) -> DenseContexts:
        """Leave in its slot whoever can stay, and put the others into the slots between."""
        residents, buffer.residents = buffer.residents, {}
        slots: list[ScheduledSequence | None] = [None] * len(members)
        newcomers = []
        for row in members:
            resident = residents.get(row.sequence)
            if resident is not None and resident.slot < len(slots) and resident.continues(row):
                slots[resident.slot] = row
            else:
                newcomers.append(row)
        free = [slot for slot, row in enumerate(slots) if row is None]
        fills = []
        for slot, row in zip(free, newcomers, strict=True):
            slots[slot] = row
            table = row.sequence.block_table[: blocks_for(row.end, self._layout.block_size)]
            gather = self._on_device(block_rows(self._layout, np.array([table], dtype=np.int64)))
            fills.append(Fill(slot, row.end, gather))
        rows = [row for row in slots if row is not None]
        longest = max(row.end for row in rows)
        block_size = self._layout.block_size
        padded = min(blocks_for(longest, block_size) * block_size, buffer.kv.shape[-2])
        return DenseContexts(rows, buffer, tuple(fills), self._appends(rows, buffer), padded)

    def _appends(self, rows: list[ScheduledSequence], buffer: DenseBuffer) -> Tensor:
        _, _, num_slots, num_kv_heads, capacity, _ = buffer.kv.shape
        slots = np.arange(len(rows))[:, None, None] + np.array([0, num_slots])[:, None]
        heads = slots * num_kv_heads + np.arange(num_kv_heads)
        positions = np.array([row.start for row in rows])[:, None, None]
        return self._on_device((heads * capacity + positions).reshape(-1))

    def _on_device(self, indices: Indices) -> Tensor:
        return torch.from_numpy(indices).to(self._like.device)
