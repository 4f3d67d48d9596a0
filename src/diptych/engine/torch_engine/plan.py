"""One step's batch as index tensors, built once and used by every layer.

Tokens of all rows are packed without padding: first the decodes, then the prefill chunks. Decodes attend
in groups of similar context: those with slots in the dense view by buffer, in the order of their slots;
the others, for which there is no memory, longest first, in groups so small that the keys and values that
each gathers stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import chain, compress
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.core.blocks import blocks_for
from diptych.core.kv_layout import KVLayout
from diptych.core.sequence import Batch, ScheduledSequence
from diptych.engine.torch_engine.dense_view import DenseContexts, DenseView
from diptych.engine.torch_engine.kv_cache import Indices, KVCache, block_rows, token_rows

# One group's gathered keys and values. Measured with 1 MiB of L2 and 32 MiB of L3: 4 to 6 MiB are equally
# good; at 0.5 MiB the calls, and at 32 MiB the cache misses, cost a fifth more.
GROUP_BYTES = 4 << 20


class Contexts(Protocol):
    """Where the keys and values of N decoding sequences come from."""

    def load(self, cache: KVCache, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, each [N * num_kv_heads, slots, head_dim], zero-valued past each context.

        `keys` and `values` [N, num_kv_heads, head_dim] are those of this step, which the cache has by now.
        """
        ...


@dataclass(frozen=True, slots=True)
class GatheredContexts:
    """Contexts fetched from their blocks in every step. `unused_rows` numbers the token rows past each
    context; None if there is none."""

    num_sequences: int
    gather: Tensor
    unused_rows: Tensor | None

    def load(self, cache: KVCache, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `Contexts`."""
        return cache.gather(layer, self.gather, self.num_sequences, self.unused_rows)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decodes that attend together, padded to the same number of slots.

    `unused` marks the slots past each context, bool [N, 1, U]. It is about the last U slots: those before
    are in use by all. None if U is 0.
    """

    tokens: slice  # of the packed batch
    contexts: Contexts
    unused: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens of one sequence that attend to all before them."""

    row: int  # of the batch
    tokens: slice  # of the packed batch
    start: int  # position of the first
    samples: bool  # whether the last one's logits are wanted
    gather: Tensor


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A packed batch of T tokens. `outputs` numbers the tokens whose logits are sampled, in the order of
    `sampling`, which numbers their rows in the batch."""

    token_ids: Tensor
    positions: Tensor
    writes: Tensor
    outputs: Tensor
    sampling: tuple[int, ...]
    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillChunk, ...]
    dense: tuple[DenseContexts, ...]  # of the decodes, those to keep when the step is done

    def without(self, rows: Collection[int]) -> tuple[StepPlan, Tensor]:
        """The same without some prefill chunks, and the numbers that its tokens had before."""
        end = self.prefills[0].tokens.start if self.prefills else len(self.token_ids)
        left = [torch.arange(end)]
        prefills: list[PrefillChunk] = []
        for chunk in self.prefills:
            if chunk.row not in rows:
                left.append(torch.arange(chunk.tokens.start, chunk.tokens.stop))
                prefills.append(replace(chunk, tokens=slice(end, end + len(left[-1]))))
                end = prefills[-1].tokens.stop
        tokens = torch.cat(left).to(self.token_ids.device)
        sampling = [row not in rows for row in self.sampling]
        narrowed = replace(
            self,
            token_ids=self.token_ids[tokens],
            positions=self.positions[tokens],
            writes=self.writes.view(len(self.token_ids), -1)[tokens].flatten(),
            outputs=torch.searchsorted(tokens, self.outputs[torch.tensor(sampling, dtype=torch.bool)]),
            sampling=tuple(compress(self.sampling, sampling)),
            prefills=tuple(prefills),
        )
        return narrowed, tokens


def plan_step(batch: Batch, layout: KVLayout, view: DenseView, device: torch.device) -> StepPlan:
    """Lay out a batch, maybe of no rows. Rows must be non-empty and their block tables long enough."""
    dense, homeless = view.place([row for row in batch.rows if row.num_tokens == 1])
    homeless.sort(key=lambda row: -row.end)
    decodes = [*chain.from_iterable(contexts.rows for contexts in dense), *homeless]
    packed = decodes + [row for row in batch.rows if row.num_tokens > 1]
    indices = {row.sequence: index for index, row in enumerate(batch.rows)}
    ends = np.cumsum([row.num_tokens for row in packed], dtype=np.int64)
    sampled = np.flatnonzero([row.samples for row in packed])
    positions = _joined([np.arange(row.start, row.end) for row in packed])

    def on_device(indices: Indices) -> Tensor:
        return torch.from_numpy(indices).to(device)

    def chunk(row: ScheduledSequence, end: int) -> PrefillChunk:
        gather = on_device(block_rows(layout, _table(row, layout)))
        tokens = slice(end - row.num_tokens, end)
        return PrefillChunk(indices[row.sequence], tokens, row.start, row.samples, gather)

    return StepPlan(
        token_ids=on_device(_token_ids(packed, len(positions))),
        positions=on_device(positions),
        writes=on_device(token_rows(layout, _blocks(packed, layout), positions % layout.block_size)),
        outputs=on_device(ends[sampled] - 1),
        sampling=tuple(indices[packed[place].sequence] for place in sampled),
        decodes=(*_dense_groups(dense, device), *_gathered_groups(decodes, len(homeless), layout, device)),
        prefills=tuple(map(chunk, packed[len(decodes) :], ends[len(decodes) :].tolist())),
        dense=tuple(dense),
    )


def _token_ids(packed: list[ScheduledSequence], num_tokens: int) -> Indices:
    tokens = chain.from_iterable(row.sequence.token_ids[row.start : row.end] for row in packed)
    return np.fromiter(tokens, dtype=np.int64, count=num_tokens)


def _blocks(packed: list[ScheduledSequence], layout: KVLayout) -> Indices:
    """The block that each packed token is written to."""
    size = layout.block_size
    parts = []
    for row in packed:
        first = row.start // size
        table = np.array(row.sequence.block_table[first : blocks_for(row.end, size)], dtype=np.int64)
        parts.append(table[np.arange(row.start, row.end) // size - first])
    return _joined(parts)


def _joined(parts: list[Indices]) -> Indices:
    """One after the other; nothing, if there are none."""
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _table(row: ScheduledSequence, layout: KVLayout) -> Indices:
    """The blocks of a row's whole context, [1, B]."""
    return np.array([row.sequence.block_table[: blocks_for(row.end, layout.block_size)]], dtype=np.int64)


def _dense_groups(dense: list[DenseContexts], device: torch.device) -> Iterator[DecodeGroup]:
    first = 0
    for contexts in dense:
        tokens = slice(first, first + len(contexts.rows))
        yield DecodeGroup(tokens, contexts, _mask(contexts.rows, contexts.buffer.capacity, device))
        first = tokens.stop


def _gathered_groups(
    decodes: list[ScheduledSequence], num_homeless: int, layout: KVLayout, device: torch.device
) -> Iterator[DecodeGroup]:
    """Cut the last decodes, sorted by falling context, so that padding stays under half of each group."""
    first = len(decodes) - num_homeless
    while first < len(decodes):
        longest = blocks_for(decodes[first].end, layout.block_size)
        room = max(1, GROUP_BYTES // (longest * layout.block_bytes))
        end = first + 1
        while end < min(first + room, len(decodes)) and decodes[end].end * 2 >= decodes[first].end:
            end += 1
        yield _gathered_group(decodes[first:end], slice(first, end), layout, device)
        first = end


def _gathered_group(
    rows: list[ScheduledSequence], tokens: slice, layout: KVLayout, device: torch.device
) -> DecodeGroup:
    num_blocks = blocks_for(rows[0].end, layout.block_size)
    tables = np.zeros((len(rows), num_blocks), dtype=np.int64)
    for table, row in zip(tables, rows, strict=True):
        used = blocks_for(row.end, layout.block_size)
        table[:used] = row.sequence.block_table[:used]
    gather = torch.from_numpy(block_rows(layout, tables)).to(device)
    num_slots = num_blocks * layout.block_size
    shape = (2, len(rows), layout.num_kv_heads, num_slots)
    unused_rows = torch.from_numpy(np.flatnonzero(np.broadcast_to(_unused(rows, 0, num_slots), shape))).to(device)
    contexts = GatheredContexts(len(rows), gather, unused_rows if len(unused_rows) else None)
    return DecodeGroup(tokens, contexts, _mask(rows, num_slots, device))


def _mask(rows: list[ScheduledSequence], num_slots: int, device: torch.device) -> Tensor | None:
    """See `DecodeGroup.unused`."""
    shortest = min(row.end for row in rows)
    return torch.from_numpy(_unused(rows, shortest, num_slots)).to(device) if shortest < num_slots else None


def _unused(rows: list[ScheduledSequence], first: int, num_slots: int) -> NDArray[np.bool_]:
    """Which slots from `first` on lie past each row's context, [N, 1, num_slots - first]."""
    ends = np.array([row.end for row in rows])
    return np.arange(first, num_slots) >= ends[:, None, None]
