"""From two layouts and two block tables to the frozen plan of what moves.

    source blocks   7  8  9 | 3          logical blocks 4 5 6 7 of one sequence
    target blocks  20 21 22 | 5
                   └──one──┘ └one┘       ranges: consecutive on both sides are one

Equal layouts for now; the shape of the plan is already that of the general case.
"""

from __future__ import annotations

from collections.abc import Sequence

from diptych.core.blocks import BlockId
from diptych.core.kv_layout import ByteRange, KVLayout, LayerTransfer, TransferPlan


def plan_transfer(
    source: KVLayout,
    target: KVLayout,
    source_blocks: Sequence[BlockId],
    target_blocks: Sequence[BlockId],
    *,
    first_block: int,
) -> TransferPlan:
    """Plan moving logical blocks [first_block, first_block + len(source_blocks)) of one sequence.

    `source_blocks[i]` and `target_blocks[i]` hold the same logical block. Every byte of the target
    blocks is written exactly once, by the fewest ranges. Raises ValueError if the layouts differ
    (re-sharding is not built yet) or the tables do not match.
    """
    if source != target:
        raise ValueError(f"these layouts need re-sharding, which is not built yet: {source} -> {target}")
    if len(source_blocks) != len(target_blocks):
        raise ValueError(f"{len(source_blocks)} source blocks for {len(target_blocks)} target blocks")
    ranges = _coalesce(source_blocks, target_blocks, source.block_bytes)
    return TransferPlan(
        source_digest=source.digest,
        target_digest=target.digest,
        first_block=first_block,
        num_blocks=len(source_blocks),
        layers=tuple(LayerTransfer(layer, 0, 0, ranges) for layer in range(source.num_layers)),
    )


def _coalesce(
    source_blocks: Sequence[BlockId], target_blocks: Sequence[BlockId], block_bytes: int
) -> tuple[ByteRange, ...]:
    """One range for each longest run of blocks that is consecutive on both sides."""
    ranges: list[ByteRange] = []
    start = 0
    for end in range(1, len(source_blocks) + 1):
        continues = (
            end < len(source_blocks)
            and source_blocks[end] == source_blocks[end - 1] + 1
            and target_blocks[end] == target_blocks[end - 1] + 1
        )
        if not continues:
            length = (end - start) * block_bytes
            ranges.append(ByteRange(source_blocks[start] * block_bytes, target_blocks[start] * block_bytes, length))
            start = end
    return tuple(ranges)
