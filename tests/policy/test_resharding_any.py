"""Plans between any two layouts, carried out on real bytes and held against an obvious model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resharding_model import (
    CANARY,
    UNUSED,
    Case,
    cases,
    execute,
    fewest_ranges,
    filled_ranks,
    layer_of,
    shared_vectors,
)

from diptych.core.kv_layout import ByteRange, KVLayout, SequenceKV, TransferPlan
from diptych.policy.digest_units import byte_runs, digest_units
from diptych.policy.resharding import head_pairs, incompatibilities, plan_resharding

MODEL = KVLayout(num_layers=4, num_kv_heads=8, head_dim=2, dtype="float16", block_size=16)
MLA = KVLayout(num_layers=3, latent_dim=6, dtype="bfloat16", block_size=16)


def cut(model: KVLayout = MODEL, **fields: Any) -> KVLayout:
    return replace(model, **fields)


TWO_HEADS = cut(num_kv_heads=2)
PAIRS = {
    "TP 4 -> DP 4": (cut(tensor_parallel=4, expert_parallel=4), cut(data_parallel=4, expert_parallel=4)),
    "TP 8 -> TP 2": (cut(tensor_parallel=8), cut(tensor_parallel=2)),
    "TP 2 -> TP 8": (cut(tensor_parallel=2), cut(tensor_parallel=8)),
    "TP 2 -> TP 4, 2 heads": (cut(TWO_HEADS, tensor_parallel=2), cut(TWO_HEADS, tensor_parallel=4)),
    "TP 8 -> TP 2, 2 heads": (cut(TWO_HEADS, tensor_parallel=8), cut(TWO_HEADS, tensor_parallel=2)),
    "PP 2 -> TP 2": (cut(pipeline_parallel=2), cut(tensor_parallel=2)),
    "PP 3 -> PP 2, TP 2": (cut(pipeline_parallel=3), cut(pipeline_parallel=2, tensor_parallel=2)),
    "block 16 -> 64": (cut(), cut(block_size=64)),
    "block 64 -> 16": (cut(block_size=64), cut()),
    "TP 4, block 64 -> DP 2, TP 2, block 16": (
        cut(tensor_parallel=4, block_size=64),
        cut(tensor_parallel=2, data_parallel=2),
    ),
    "MLA, TP 8 -> DP 4": (cut(MLA, tensor_parallel=8), cut(MLA, data_parallel=4)),
    "MLA, TP 2 -> TP 4, block 64": (cut(MLA, tensor_parallel=2), cut(MLA, tensor_parallel=4, block_size=64)),
}


def plan_of(case: Case) -> TransferPlan:
    return plan_resharding(case.source, case.target, case.tokens)


def check_bytes(case: Case) -> None:
    """After the plan every target rank is as if it had computed `tokens` itself; every byte was written once."""
    source = filled_ranks(case.source, case.source.tokens, UNUSED)
    target = filled_ranks(case.target, range(0), CANARY)
    writes = execute(plan_of(case), case, source, target)
    expected = filled_ranks(case.target, case.tokens, CANARY)
    for rank, memory in expected.items():
        assert np.array_equal(target[rank], memory)
        assert np.array_equal(writes[rank], (memory.reshape(-1) != CANARY).repeat(4))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_missing_byte_is_written_once_and_nothing_else(case: Case) -> None:
    check_bytes(case)


@pytest.mark.parametrize(("source", "target"), PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("tokens", [range(128), range(64, 128), range(21, 101)], ids=["all", "blocks", "tokens"])
def test_pairs_that_matter(source: KVLayout, target: KVLayout, tokens: range) -> None:
    def held(layout: KVLayout, shift: int) -> SequenceKV:
        blocks = [(5 * index + shift) % 11 for index in range(128 // layout.block_size)]
        return SequenceKV(layout, blocks, data_rank=layout.data_parallel - 1)

    check_bytes(Case(held(source, 2), held(target, 7), tokens))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_ranges_are_the_fewest(case: Case) -> None:
    """In logical order always, and in any order where both block tables ascend."""
    size = case.source.layout.vector_bytes
    for part in plan_of(case).layers:
        vectors = shared_vectors(case, part)
        assert len(part.ranges) == fewest_ranges(vectors, size)
        if case.ascending:
            assert len(part.ranges) == fewest_ranges(sorted(vectors), size)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_bytes_come_in_logical_order(case: Case) -> None:
    """So that they can be taken from a stream without knowing the other side's block table."""
    size = case.source.layout.vector_bytes
    for part in plan_of(case).layers:
        moved = [
            (span.source_offset + step, span.target_offset + step)
            for span in part.ranges
            for step in range(0, span.length, size)
        ]
        assert moved == shared_vectors(case, part)


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_plans_of_chunks_add_up_to_the_whole(case: Case, data: st.DataObject) -> None:
    edges = data.draw(st.lists(st.integers(case.tokens.start, case.tokens.stop), max_size=4).map(sorted))
    bounds = [case.tokens.start, *edges, case.tokens.stop]
    chunks = [plan_of(replace(case, tokens=range(*pair))) for pair in zip(bounds, bounds[1:], strict=False)]
    assert sum((bytes_moved(chunk) for chunk in chunks), Counter()) == bytes_moved(plan_of(case))


def bytes_moved(plan: TransferPlan) -> Counter[tuple[int, ...]]:
    return Counter(
        (part.layer, part.source_rank, part.target_rank, span.source_offset + byte, span.target_offset + byte)
        for part in plan.layers
        for span in part.ranges
        for byte in range(span.length)
    )


@settings(max_examples=100, deadline=None)
@given(cases())
def test_layers_with_the_same_cut_share_their_ranges(case: Case) -> None:
    plan = plan_of(case)
    pairs = head_pairs(case.source.layout, case.target.layout)
    for index, part in enumerate(plan.layers):
        assert part.layer == index // len(pairs)
        assert part.ranges is plan.layers[index % len(pairs)].ranges


@pytest.mark.parametrize(("heads", "source_ranks", "target_ranks"), [(8, 32, 8), (2, 8, 2), (1, 4, 1), (2, 4, 8)])
def test_replicas_share_the_reading(heads: int, source_ranks: int, target_ranks: int) -> None:
    model = cut(num_layers=16, num_kv_heads=heads)
    source, target = cut(model, tensor_parallel=source_ranks), cut(model, tensor_parallel=target_ranks)
    plan = plan_resharding(SequenceKV(source, [0]), SequenceKV(target, [0]), range(16))
    reads = Counter(part.source_rank for part in plan.layers)
    assert len(reads) == source_ranks
    assert len(set(reads.values())) == 1


@pytest.mark.parametrize("ranks", [2, 8])
def test_equal_layouts_pair_rank_with_rank(ranks: int) -> None:
    """Replicas too: the fewest connections, and each over its own link."""
    layout = cut(TWO_HEADS, tensor_parallel=ranks, pipeline_parallel=2)
    plan = plan_resharding(SequenceKV(layout, [0, 1]), SequenceKV(layout, [4, 5]), range(32))
    assert all(part.source_rank == part.target_rank for part in plan.layers)
    assert [len(part.ranges) for part in plan.layers] == [1] * ranks * 4


def test_known_plan() -> None:
    """KV heads 0-3 from two ranks to one, as in the module's picture."""
    source, target = cut(num_layers=1, num_kv_heads=4, tensor_parallel=2), cut(num_layers=1, num_kv_heads=4)
    plan = plan_resharding(SequenceKV(source, [7]), SequenceKV(target, [20]), range(16))
    two = 2 * 16 * 2 * 2  # heads, slots, dims, bytes
    assert [(part.source_rank, part.target_rank, part.ranges) for part in plan.layers] == [
        (0, 0, (ByteRange(14 * two, 80 * two, two), ByteRange(15 * two, 82 * two, two))),
        (1, 0, (ByteRange(14 * two, 81 * two, two), ByteRange(15 * two, 83 * two, two))),
    ]
    assert (plan.first_token, plan.num_tokens, plan.first_block, plan.num_blocks) == (0, 16, 0, 1)


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_both_sides_digest_the_same_bytes(case: Case, data: st.DataObject) -> None:
    """Before the transfer at the source, after it at the target; together the units are all that moved."""
    source = filled_ranks(case.source, case.source.tokens, UNUSED)
    target = filled_ranks(case.target, range(0), CANARY)
    plan = plan_of(case)
    execute(plan, case, source, target)
    ours, theirs = case.source.layout, case.target.layout
    whole = int(np.lcm(ours.block_size, theirs.block_size))
    units = digest_units(ours, theirs, case.tokens, whole * data.draw(st.integers(1, 3)))
    pairs = head_pairs(ours, theirs)
    for index, part in enumerate(plan.layers):
        there = layer_of(case.source, source[part.source_rank], part.source_rank, part.layer)
        here = layer_of(case.target, target[part.target_rank], part.target_rank, part.layer)
        mine = [unit for unit in units if unit.pair == pairs[index % len(pairs)]]
        contents = [b"".join(there[at : at + size] for at, size in byte_runs(case.source, unit)) for unit in mine]
        assert contents == [
            b"".join(here[at : at + size] for at, size in byte_runs(case.target, unit)) for unit in mine
        ]
        sent = [there[span.source_offset : span.source_offset + span.length] for span in part.ranges]
        assert b"".join(contents) == b"".join(sent)


def test_units_of_equal_layouts_are_blocks() -> None:
    units = digest_units(MODEL, MODEL, range(16, 64))
    kv = SequenceKV(MODEL, [9, 4, 7], first_block=1)
    assert [byte_runs(kv, unit) for unit in units] == [
        [(block * MODEL.block_bytes, MODEL.block_bytes)] for block in kv.blocks
    ]


def test_units_are_as_many_as_promised() -> None:
    source, target = cut(tensor_parallel=8), cut(tensor_parallel=2, block_size=64)
    assert len(digest_units(source, target, range(256))) == 8 * 4
    assert len(digest_units(source, target, range(256), group=128)) == 8 * 2
    assert len(digest_units(source, target, range(10, 70))) == 8 * 2
    with pytest.raises(ValueError, match="a group of 32 tokens does not consist of whole blocks"):
        digest_units(source, target, range(256), group=32)


def test_only_the_cut_may_differ() -> None:
    other = cut(tensor_parallel=2, pipeline_parallel=2, data_parallel=2, expert_parallel=2, block_size=64)
    assert incompatibilities(MODEL, other) == []
    assert incompatibilities(MODEL, cut(num_layers=5, dtype="float32")) == [
        "num_layers is 4 on one side and 5 on the other",
        "dtype is 'float16' on one side and 'float32' on the other",
    ]
    assert len(incompatibilities(MODEL, MLA)) == 5
    with pytest.raises(ValueError, match="KV cannot move between these layouts: head_dim is 2"):
        plan_resharding(SequenceKV(MODEL, [0]), SequenceKV(cut(head_dim=4), [0]), range(16))


@pytest.mark.parametrize("tokens", [range(15, 32), range(16, 49)])
def test_tokens_without_a_place_are_refused(tokens: range) -> None:
    held, wide = SequenceKV(MODEL, [3, 1], first_block=1), SequenceKV(MODEL, range(9))
    with pytest.raises(ValueError, match="have no place in the source's blocks"):
        plan_resharding(held, wide, tokens)
    with pytest.raises(ValueError, match="have no place in the target's blocks"):
        plan_resharding(wide, held, tokens)
    with pytest.raises(ValueError, match=r"range\(16, 32, 2\) have no place"):
        plan_resharding(wide, wide, range(16, 32, 2))
