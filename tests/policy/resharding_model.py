"""A slow, obvious model of a re-sharded hand-off: every rank's memory as an array, filled by what it holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from diptych.core.kv_layout import DTYPE_BYTES, KVLayout, KVMemory, LayerTransfer, SequenceKV, TransferPlan

WORD = 4  # bytes of an element of the model: each is a number that names its place in the sequence
UNUSED, CANARY = 0xBAD0BAD0, 0xDEADBEEF
Words = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    source: SequenceKV
    target: SequenceKV
    tokens: range
    ascending: bool = False  # block tables


def num_blocks(kv: SequenceKV) -> int:
    return max(kv.blocks, default=0) + 2


def filled_ranks(kv: SequenceKV, tokens: range, background: int) -> dict[int, Words]:
    """Memory of every rank of the worker, [layer][block][plane][head][slot][word], where `tokens` are in place."""
    layout = kv.layout
    memories = {}
    for rank in range(layout.world_size):
        layers, heads = layout.layers_of(rank), layout.heads_of(rank)
        shape = (len(layers), num_blocks(kv), layout.planes, len(heads), layout.block_size, layout.vector_bytes // WORD)
        memory = np.full(shape, background, dtype=np.uint32)
        holder = rank // (layout.tensor_parallel * layout.pipeline_parallel)
        for token in tokens if holder == kv.data_rank else ():
            block = kv.blocks[token // layout.block_size - kv.first_block]
            memory[:, block, :, :, token % layout.block_size] = content(layout, layers, heads, token)
        memories[rank] = memory
    return memories


def content(layout: KVLayout, layers: range, heads: range, token: int) -> Words:
    """[layer][plane][head][word]: a number for each that no other place of the sequence has."""
    words = layout.vector_bytes // WORD
    axes = np.ix_(np.array(layers), np.arange(layout.planes), np.array(heads), np.arange(words))
    sizes = (layout.planes, layout.heads, words)
    places: Words = np.ravel_multi_index(axes, (layout.num_layers, *sizes)).astype(np.uint32)
    return places + np.uint32(token * layout.num_layers * int(np.prod(sizes)))


def layer_of(kv: SequenceKV, memory: Words | Bytes, rank: int, layer: int) -> memoryview:
    """One layer's bytes, through the addressing that transports use."""
    view = memoryview(memory.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    return KVMemory(kv.layout, num_blocks(kv), view, rank).layer(layer)


def execute(plan: TransferPlan, case: Case, source: dict[int, Words], target: dict[int, Words]) -> dict[int, Bytes]:
    """Carry out a plan by plain slicing. Returns how often each byte of the target was written."""
    writes = {rank: np.zeros(memory.nbytes, dtype=np.uint8) for rank, memory in target.items()}
    for part in plan.layers:
        there = layer_of(case.source, source[part.source_rank], part.source_rank, part.layer)
        here = layer_of(case.target, target[part.target_rank], part.target_rank, part.layer)
        count = layer_of(case.target, writes[part.target_rank], part.target_rank, part.layer)
        for span in part.ranges:
            piece = slice(span.target_offset, span.target_offset + span.length)
            here[piece] = there[span.source_offset : span.source_offset + span.length]
            counts = np.frombuffer(count, dtype=np.uint8)[piece]
            counts += 1
    return writes


def shared_vectors(case: Case, part: LayerTransfer) -> list[tuple[int, int]]:
    """(source, target) offset of every vector that this pair of ranks shares, in logical order."""
    sizes = (case.source.layout.block_size, case.target.layout.block_size)
    edges = [token for token in case.tokens if token % sizes[0] == 0 or token % sizes[1] == 0]
    edges = sorted({case.tokens.start, case.tokens.stop, *edges})
    source, target = case.source, case.target
    ours, theirs = part.source_rank, part.target_rank
    heads = set(source.layout.heads_of(ours)) & set(target.layout.heads_of(theirs))
    return [
        (address(source, ours, plane, head, token), address(target, theirs, plane, head, token))
        for start, stop in zip(edges, edges[1:], strict=False)
        for plane in range(source.layout.planes)
        for head in sorted(heads)
        for token in range(start, stop)
    ]


def address(kv: SequenceKV, rank: int, plane: int, head: int, token: int) -> int:
    layout = kv.layout
    heads = layout.heads_of(rank)
    place = (
        kv.blocks[token // layout.block_size - kv.first_block],
        plane,
        heads.index(head),
        token % layout.block_size,
    )
    shape = (num_blocks(kv), layout.planes, len(heads), layout.block_size)
    return int(np.ravel_multi_index(place, shape)) * layout.vector_bytes


def fewest_ranges(vectors: list[tuple[int, int]], size: int) -> int:
    """Copies that are left when every vector has been joined with the one before it, where it can be."""
    before = [(source + size, target + size) for source, target in vectors]
    return sum(pair != last for pair, last in zip(vectors, [(-1, -1), *before], strict=False))


@st.composite
def layouts(draw: st.DrawFn, shape: KVLayout) -> KVLayout:
    """Any cut of the same model."""
    ranks = [size for size in (1, 2, 3, 4, 6, 8) if gcd(size, shape.heads) in (size, shape.heads)]
    return replace(
        shape,
        block_size=draw(st.sampled_from((1, 2, 3, 4, 6, 8))),
        tensor_parallel=draw(st.sampled_from(ranks)),
        pipeline_parallel=draw(st.integers(1, min(3, shape.num_layers))),
        data_parallel=draw(st.integers(1, 3)),
        expert_parallel=draw(st.integers(1, 4)),
    )


@st.composite
def shapes(draw: st.DrawFn) -> KVLayout:
    dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    dim = draw(st.integers(1, 2)) * WORD // DTYPE_BYTES[dtype]
    heads = draw(st.sampled_from((0, 1, 2, 3, 4, 6, 8)))
    vectors = {"num_kv_heads": heads, "head_dim": dim} if heads else {"latent_dim": dim}
    return KVLayout(num_layers=draw(st.integers(1, 4)), dtype=dtype, block_size=1, **vectors)


def sequence_kv(draw: st.DrawFn, layout: KVLayout, tokens: range, ascending: bool) -> SequenceKV:
    """Blocks for `tokens`: a whole table or the part that is needed."""
    first = draw(st.integers(0, tokens.start // layout.block_size))
    count = -(-tokens.stop // layout.block_size) - first + draw(st.integers(0, 1))
    blocks = draw(st.permutations(range(count + 3)))[:count]
    data_rank = draw(st.integers(0, layout.data_parallel - 1))
    return SequenceKV(layout, sorted(blocks) if ascending else blocks, first, data_rank)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape, ascending = draw(shapes()), draw(st.booleans())
    start = draw(st.integers(0, 10))
    tokens = range(start, start + draw(st.integers(0, 14)))
    source, target = (sequence_kv(draw, draw(layouts(shape)), tokens, ascending) for _ in range(2))
    return Case(source, target, tokens, ascending)
