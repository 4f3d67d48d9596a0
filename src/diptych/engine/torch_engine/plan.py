"""One step's batch as index tensors, built once and used by every layer.

Tokens of all rows are packed without padding: first the decodes, longest context first, then the
prefill chunks. Decodes attend in groups of similar context, small enough that a group's keys and
values stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from diptych.core.blocks import blocks_for
from diptych.core.kv_layout import KVLayout
from diptych.core.sequence import Batch, ScheduledSequence
from diptych.engine.torch_engine.kv_cache import Indices, block_rows, token_rows

# One group's gathered keys and values. Measured with 1 MiB of L2 and 32 MiB of L3: 4 to 6 MiB are equally
# good; at 0.5 MiB the calls, and at 32 MiB the cache misses, cost a fifth more.
GROUP_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decodes that attend together, padded to the blocks of the longest.

    `unused` marks the slots past each context, bool [N, 1, slots]; `unused_rows` numbers them as token
    rows of the gathered keys and values. Both are None if every slot is in use.
    """

    tokens: slice  # of the packed batch
    gather: Tensor
    unused: Tensor | None
    unused_rows: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens of one sequence that attend to all before them."""

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


def plan_step(batch: Batch, layout: KVLayout, device: torch.device) -> StepPlan:
    """Lay out a batch. Rows must be non-empty and their block tables long enough."""
    rows = batch.rows
    decodes = [index for index, row in enumerate(rows) if row.num_tokens == 1]
    decodes.sort(key=lambda index: -rows[index].end)
    order = decodes + [index for index, row in enumerate(rows) if row.num_tokens > 1]
    packed = [rows[index] for index in order]
    ends = np.cumsum([row.num_tokens for row in packed])
    sampled = [place for place, row in enumerate(packed) if row.samples]
    positions = np.concatenate([np.arange(row.start, row.end) for row in packed])

    def on_device(indices: Indices) -> Tensor:
        return torch.from_numpy(indices).to(device)

    def chunk(row: ScheduledSequence, end: int) -> PrefillChunk:
        gather = on_device(block_rows(layout, _table(row, layout)))
        return PrefillChunk(slice(end - row.num_tokens, end), row.start, row.samples, gather)

    return StepPlan(
        token_ids=on_device(_token_ids(packed, len(positions))),
        positions=on_device(positions),
        writes=on_device(token_rows(layout, _blocks(packed, layout), positions % layout.block_size)),
        outputs=on_device(ends[sampled] - 1),
        sampling=tuple(order[place] for place in sampled),
        decodes=tuple(
            _decode_group(packed[group], group, layout, device) for group in _groups(packed[: len(decodes)], layout)
        ),
        prefills=tuple(map(chunk, packed[len(decodes) :], ends[len(decodes) :].tolist())),
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
    return np.concatenate(parts)


def _table(row: ScheduledSequence, layout: KVLayout) -> Indices:
    """The blocks of a row's whole context, [1, B]."""
    return np.array([row.sequence.block_table[: blocks_for(row.end, layout.block_size)]], dtype=np.int64)


def _groups(decodes: list[ScheduledSequence], layout: KVLayout) -> Iterator[slice]:
    """Cut decodes, sorted by falling context, so that padding stays under half of each group."""
    first = 0
    while first < len(decodes):
        longest = blocks_for(decodes[first].end, layout.block_size)
        room = max(1, GROUP_BYTES // (longest * layout.block_bytes))
        end = first + 1
        while end < min(first + room, len(decodes)) and decodes[end].end * 2 >= decodes[first].end:
            end += 1
        yield slice(first, end)
        first = end


def _decode_group(rows: list[ScheduledSequence], tokens: slice, layout: KVLayout, device: torch.device) -> DecodeGroup:
    num_blocks = blocks_for(rows[0].end, layout.block_size)
    tables = np.zeros((len(rows), num_blocks), dtype=np.int64)
    for table, row in zip(tables, rows, strict=True):
        used = blocks_for(row.end, layout.block_size)
        table[:used] = row.sequence.block_table[:used]
    contexts = np.array([row.end for row in rows])
    unused = np.arange(num_blocks * layout.block_size) >= contexts[:, None]
    gather = torch.from_numpy(block_rows(layout, tables)).to(device)
    if not unused.any():
        return DecodeGroup(tokens, gather, None, None)
    shape = (2, len(rows), layout.num_kv_heads, unused.shape[1])
    unused_rows = np.flatnonzero(np.broadcast_to(unused[None, :, None, :], shape))
    return DecodeGroup(
        tokens, gather, torch.from_numpy(unused[:, None, :]).to(device), torch.from_numpy(unused_rows).to(device)
    )
