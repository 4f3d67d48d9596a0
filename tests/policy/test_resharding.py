"""Plans of equal layouts: every byte once, by the fewest ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.kv_layout import KVLayout
from diptych.policy.resharding import plan_transfer

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype="bfloat16", block_size=4)
SIZE = LAYOUT.block_bytes


@st.composite
def block_tables(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    count = draw(st.integers(0, 12))
    tables = st.lists(st.integers(0, 15), min_size=count, max_size=count, unique=True)
    return draw(tables), draw(tables)


@given(block_tables(), st.integers(0, 5))
def test_every_byte_of_the_target_is_written_once_from_its_own_block(
    tables: tuple[list[int], list[int]], first_block: int
) -> None:
    source_blocks, target_blocks = tables
    plan = plan_transfer(LAYOUT, LAYOUT, source_blocks, target_blocks, first_block=first_block)

    assert (plan.source_digest, plan.target_digest) == (LAYOUT.digest, LAYOUT.digest)
    assert (plan.first_block, plan.num_blocks) == (first_block, len(source_blocks))
    assert [(part.layer, part.source_rank, part.target_rank) for part in plan.layers] == [(i, 0, 0) for i in range(3)]
    wanted = {
        target * SIZE + byte: source * SIZE + byte
        for source, target in zip(source_blocks, target_blocks, strict=True)
        for byte in range(SIZE)
    }
    for part in plan.layers:
        moved = [
            (span.target_offset + byte, span.source_offset + byte)
            for span in part.ranges
            for byte in range(span.length)
        ]
        assert len(moved) == len(wanted)
        assert dict(moved) == wanted


@given(block_tables())
def test_ranges_are_the_longest_and_in_logical_order(tables: tuple[list[int], list[int]]) -> None:
    source_blocks, target_blocks = tables
    ranges = plan_transfer(LAYOUT, LAYOUT, source_blocks, target_blocks, first_block=0).layers[0].ranges

    for left, right in zip(ranges, ranges[1:], strict=False):
        joined_source = left.source_offset + left.length == right.source_offset
        joined_target = left.target_offset + left.length == right.target_offset
        assert not (joined_source and joined_target)
    sent = [(span.source_offset + offset) // SIZE for span in ranges for offset in range(0, span.length, SIZE)]
    assert sent == source_blocks


def test_consecutive_blocks_are_one_range() -> None:
    plan = plan_transfer(LAYOUT, LAYOUT, [7, 8, 9, 3], [20, 21, 22, 5], first_block=4)
    assert [(span.source_offset, span.target_offset, span.length) for span in plan.layers[0].ranges] == [
        (7 * SIZE, 20 * SIZE, 3 * SIZE),
        (3 * SIZE, 5 * SIZE, SIZE),
    ]


def test_other_layouts_and_unequal_tables_are_refused() -> None:
    other = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype="float32", block_size=4)
    with pytest.raises(ValueError, match="dtype is .bfloat16. on one side and .float32. on the other"):
        plan_transfer(LAYOUT, other, [0], [0], first_block=0)
    with pytest.raises(ValueError, match="2 source blocks for 1"):
        plan_transfer(LAYOUT, LAYOUT, [0, 1], [0], first_block=0)
