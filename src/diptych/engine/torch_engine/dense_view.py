"""The contexts of decoding sequences, kept side by side from step to step.

Attention wants each context in one piece, the cache holds it in scattered blocks, and gathering them
anew in every step costs as much as attending. So a sequence that decodes gets a *slot* in a dense
buffer: filled from its blocks once, then lengthened by one token a step. Blocks stay the truth; all of
this can be dropped at any time.

Sequences attend together with all others of their buffer, and there is one buffer for each *size* of
context, 64, 96, 128, 192, 256, ... tokens: so padding is less than a third of a slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diptych.core.blocks import BlockId, blocks_for
from diptych.core.kv_layout import KVLayout
from diptych.core.sequence import ScheduledSequence, Sequence
from diptych.engine.torch_engine.kv_cache import Indices, KVCache, block_rows

MIN_SIZE = 64
# Slots of a buffer have the same capacity, a multiple of this. They are filled anew when one outgrows it.
CAPACITY_STEP = 64


def size_for(num_tokens: int) -> int:
    """The smallest power of two, or three quarters of one, that is at least `num_tokens` and MIN_SIZE."""
    power: int = 1 << (max(num_tokens, MIN_SIZE) - 1).bit_length()
    smaller = power // 4 * 3
    return smaller if smaller >= MIN_SIZE and num_tokens <= smaller else power


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
    """Slots of one capacity, `kv` [layer][K or V][slot][kv_head][position][head_dim], in storage for the
    largest they may get. Packed without gaps, since products copy whatever is not.

    `residents` are those that took part in the latest step; their values past the end are zero.
    """

    def __init__(self, layout: KVLayout, num_slots: int, max_capacity: int, like: Tensor) -> None:
        self._shape = (layout.num_layers, 2, num_slots, layout.num_kv_heads)
        self._head_dim = layout.head_dim
        self._storage = like.new_empty(math.prod(self._shape) * max_capacity * layout.head_dim)
        self.num_slots = num_slots
        self.residents: dict[Sequence, Resident] = {}
        self.set_capacity(0)

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes

    @property
    def capacity(self) -> int:
        return self.kv.shape[-2]

    def set_capacity(self, capacity: int) -> None:
        """Empty all slots and give them another capacity."""
        shape = (*self._shape, capacity, self._head_dim)
        self.kv = self._storage[: math.prod(shape)].view(shape)
        self.residents = {}


@dataclass(frozen=True, slots=True)
class Fill:
    """A slot to be filled with `end` tokens. `gather` has the block rows of its keys, then of its values,
    for the whole capacity."""

    slot: int
    end: int
    gather: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class DenseContexts:
    """The contexts of `rows`, which sit in the first slots of `buffer`, one after the other."""

    rows: list[ScheduledSequence]
    buffer: DenseBuffer
    fills: tuple[Fill, ...]
    appends: Tensor  # token rows of one layer of the buffer: per row its keys, then its values

    def load(self, cache: KVCache, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `plan.Contexts`."""
        kv = self.buffer.kv[layer]
        for fill in self.fills:
            for rows, into in zip(fill.gather, kv[:, fill.slot], strict=True):
                cache.copy_blocks(layer, rows, into)
            # No mask would keep a NaN among the values out of a product.
            kv[1, fill.slot, :, fill.end :] = 0
        tokens = torch.cat((keys, values), dim=1).view(-1, kv.shape[-1])
        kv.view(-1, kv.shape[-1]).index_copy_(0, self.appends, tokens)
        dense_keys, dense_values = kv[:, : len(self.rows)].flatten(1, 2)
        return dense_keys, dense_values

    def keep(self) -> None:
        """The step has computed all layers: its rows' slots are good for the next."""
        for slot, row in enumerate(self.rows):
            self.buffer.residents[row.sequence] = Resident(slot, row.end, list(row.sequence.block_table))


class DenseView:
    """All dense buffers of an engine: at most `limit` bytes, on top of the cache's blocks.

    A buffer counts at most two and a quarter times what its contexts take in the cache (sizes round up by
    less than half, and there are half as many slots again for sequences to come). Memory never written to
    is counted too, though an operating system may not back it.
    """

    def __init__(self, layout: KVLayout, like: Tensor, limit: int) -> None:
        self._layout = layout
        self._like = like
        self._limit = limit
        self._step = math.lcm(CAPACITY_STEP, layout.block_size)
        self._buffers: dict[int, DenseBuffer] = {}  # by size

    def place(self, rows: Rows[ScheduledSequence]) -> tuple[list[DenseContexts], list[ScheduledSequence]]:
        """Give slots to rows of one token each; also returns the rows for which there is no memory.

        Slots count as empty until `keep`, so a step that fails half-way leaves nothing half-written.
        """
        by_size: dict[int, list[ScheduledSequence]] = {}
        for row in rows:
            by_size.setdefault(size_for(row.end), []).append(row)
        for size in self._buffers.keys() - by_size.keys():
            del self._buffers[size]
        placed: list[DenseContexts] = []
        homeless: list[ScheduledSequence] = []
        for size, members in sorted(by_size.items()):
            buffer = self._reserve(size, len(members))
            if buffer is not None:
                members.sort(key=lambda row: row.sequence not in buffer.residents)
                placed.append(self._place(members[: buffer.num_slots], buffer))
                members = members[buffer.num_slots :]
            homeless += members
        return placed, homeless

    def forget(self, request_id: str) -> None:
        """Let go of a sequence, and of buffers that hold no other."""
        for size, buffer in list(self._buffers.items()):
            for sequence in [each for each in buffer.residents if each.request_id == request_id]:
                del buffer.residents[sequence]
            if not buffer.residents:
                del self._buffers[size]

    def _reserve(self, size: int, num_slots: int) -> DenseBuffer | None:
        """A buffer of that many slots, and some to grow into; of fewer, or none, if there is no memory."""
        buffer = self._buffers.get(size)
        max_capacity = self._round_up(size)
        others = sum(each.nbytes for each in self._buffers.values() if each is not buffer)
        affordable = (self._limit - others) // (max_capacity * self._layout.token_bytes)
        if buffer is not None and buffer.num_slots >= min(num_slots, affordable):
            return buffer
        # The old one goes before the new one comes.
        del buffer
        self._buffers.pop(size, None)
        num_slots = min(num_slots + num_slots // 2, affordable)
        if num_slots > 0:
            self._buffers[size] = DenseBuffer(self._layout, num_slots, max_capacity, self._like)
        return self._buffers.get(size)

    def _place(self, rows: list[ScheduledSequence], buffer: DenseBuffer) -> DenseContexts:
        """Leave in its slot whoever can stay, and put the others into the slots between."""
        longest = max(row.end for row in rows)
        if longest > buffer.capacity:
            buffer.set_capacity(self._round_up(longest))
        residents, buffer.residents = buffer.residents, {}
        slots: list[ScheduledSequence | None] = [None] * len(rows)
        newcomers = []
        for row in rows:
            resident = residents.get(row.sequence)
            if resident is not None and resident.slot < len(slots) and resident.continues(row):
                slots[resident.slot] = row
            else:
                newcomers.append(row)
        free = [slot for slot, row in enumerate(slots) if row is None]
        for slot, row in zip(free, newcomers, strict=True):
            slots[slot] = row
        seated = [row for row in slots if row is not None]
        fills = tuple(self._fill(slot, seated[slot], buffer) for slot in free)
        return DenseContexts(seated, buffer, fills, self._appends(seated, buffer))

    def _fill(self, slot: int, row: ScheduledSequence, buffer: DenseBuffer) -> Fill:
        block_size = self._layout.block_size
        table = np.zeros((1, buffer.capacity // block_size), dtype=np.int64)  # beyond the context any block will do
        used = blocks_for(row.end, block_size)
        table[0, :used] = row.sequence.block_table[:used]
        keys, values = self._on_device(block_rows(self._layout, table)).chunk(2)
        return Fill(slot, row.end, (keys, values))

    def _appends(self, rows: list[ScheduledSequence], buffer: DenseBuffer) -> Tensor:
        num_kv_heads = self._layout.num_kv_heads
        slots = np.arange(len(rows))[:, None, None] + np.array([0, buffer.num_slots])[:, None]
        heads = slots * num_kv_heads + np.arange(num_kv_heads)
        positions = np.array([row.start for row in rows])[:, None, None]
        return self._on_device((heads * buffer.capacity + positions).reshape(-1))

    def _round_up(self, num_tokens: int) -> int:
        return blocks_for(num_tokens, self._step) * self._step

    def _on_device(self, indices: Indices) -> Tensor:
        return torch.from_numpy(indices).to(self._like.device)
