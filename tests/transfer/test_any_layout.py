"""Hand-offs between any two layouts, over real sockets: the right bytes arrive in the right places, and nothing
else is touched."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_harness import NUM_BLOCKS, TOKEN, TRANSPORTS, World, claims_for, world

from diptych.core.blocks import blocks_for
from diptych.core.events import HandoffComplete, PushAccepted
from diptych.core.kv_layout import KVLayout, KVMemory, SequenceKV
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import plan_resharding
from diptych.transfer import pieces, places

Bytes = npt.NDArray[np.uint8]

HEADS = KVLayout(num_layers=4, num_kv_heads=4, head_dim=2, dtype="float32", block_size=4)
TWO_HEADS = replace(HEADS, num_kv_heads=2)
MLA = KVLayout(num_layers=3, latent_dim=6, dtype="bfloat16", block_size=4)
CUTS: list[dict[str, Any]] = [
    {},
    {"tensor_parallel": 2},
    {"tensor_parallel": 4, "expert_parallel": 4},
    {"tensor_parallel": 8},
    {"pipeline_parallel": 2},
    {"pipeline_parallel": 3, "tensor_parallel": 2},
    {"data_parallel": 4},
    {"data_parallel": 2, "tensor_parallel": 2},
]


def content_of(layout: KVLayout, num_tokens: int, seed: int) -> Bytes:
    """A sequence's KV, cut by nobody: [layer, plane, head, token, byte]."""
    shape = (layout.num_layers, layout.planes, layout.heads, num_tokens, layout.vector_bytes)
    return np.random.default_rng(seed).integers(1, 256, shape, dtype=np.uint8)


def put_in_place(content: Bytes, kv: SequenceKV, tokens: range, memories: Sequence[KVMemory]) -> None:
    """Write the KV of `tokens` to where a worker of this layout has it, vector by vector."""
    layout = kv.layout
    for rank in range(layout.world_size):
        if rank // (layout.pipeline_parallel * layout.tensor_parallel) != kv.data_rank:
            continue
        for layer in layout.layers_of(rank):
            paged = np.frombuffer(memories[rank].layer(layer), np.uint8)
            paged = paged.reshape(-1, layout.planes, layout.heads_per_rank, layout.block_size, layout.vector_bytes)
            heads = layout.heads_of(rank)
            for token in tokens:
                block, slot = kv.place(token)
                paged[block, :, :, slot] = content[layer, :, heads.start : heads.stop, token]


@dataclass(frozen=True)
class Case:
    source: SequenceKV
    target: SequenceKV
    first_block: int  # of the target, that is missing
    num_tokens: int
    chunks: tuple[int, ...]  # tokens at which the prompt is cut
    seed: int

    @property
    def missing(self) -> range:
        return range(self.first_block * self.target.layout.block_size, self.num_tokens)

    def claims(self, name: str) -> TicketClaims:
        return claims_for(
            name,
            tuple(self.target.blocks),
            self.first_block,
            layout=self.target.layout,
            num_tokens=self.num_tokens,
            data_rank=self.target.data_rank,
        )

    def expected(self, before: Sequence[bytes], content: Bytes) -> list[bytes]:
        """The memory of each target rank, after the hand-off."""
        layout = self.target.layout
        after = [KVMemory(layout, NUM_BLOCKS, memoryview(bytearray(old)), rank) for rank, old in enumerate(before)]
        put_in_place(content, self.target, self.missing, after)
        return [bytes(memory.buffer) for memory in after]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    model = draw(st.sampled_from((HEADS, TWO_HEADS, MLA)))
    num_tokens = draw(st.integers(1, 60))

    def side() -> SequenceKV:
        cut = {**draw(st.sampled_from(CUTS)), "block_size": draw(st.sampled_from((4, 8, 16)))}
        layout = replace(model, **cut)
        order = draw(st.permutations(range(NUM_BLOCKS)))
        blocks = order[: blocks_for(num_tokens, layout.block_size)]
        if draw(st.booleans()):
            blocks = sorted(blocks)
        return SequenceKV(layout, tuple(blocks), data_rank=draw(st.integers(0, layout.data_parallel - 1)))

    source, target = side(), side()
    first_block = draw(st.integers(0, (num_tokens - 1) // target.layout.block_size))
    group = math.lcm(source.layout.block_size, target.layout.block_size)
    edges = range(first_block * target.layout.block_size // group * group + group, num_tokens, group)
    chunks = tuple(sorted(draw(st.sets(st.sampled_from(edges), max_size=3)))) if edges else ()
    return Case(source, target, first_block, num_tokens, chunks, draw(st.integers(0, 2**32)))


def push(made: World, case: Case, claims: TicketClaims) -> None:
    """Chunk by chunk, and each layer by layer; chunks in any order."""
    link = made.link()
    edges = [case.missing.start, *case.chunks, case.num_tokens]
    chunks = [range(*pair) for pair in zip(edges, edges[1:], strict=False)]
    random.Random(case.seed).shuffle(chunks)
    for tokens in chunks:
        plan = plan_resharding(case.source, case.target, tokens)
        for layer in range(claims.layout.num_layers):
            link.push(claims.request_id, claims, plan, [layer])
    link.close_handoff(claims.request_id, claims, TOKEN)


def hand_over(case: Case, transport: str, directory: Path) -> None:
    with world(transport, directory, case.seed, case.source.layout, case.target.layout) as made:
        content = content_of(case.source.layout, case.num_tokens, case.seed)
        put_in_place(content, case.source, range(case.num_tokens), made.sources)
        for rank, memory in enumerate(made.targets):
            memory.buffer[:] = random.Random(-rank).randbytes(len(memory.buffer))
        before = [bytes(memory.buffer) for memory in made.targets]
        claims = case.claims("r1")
        made.receiver.expect(claims)
        push(made, case, claims)
        assert made.at_target.next() == HandoffComplete("r1", TOKEN)
        assert made.at_source.next() == PushAccepted("r1")
        assert [bytes(memory.buffer) for memory in made.targets] == case.expected(before, content)
        assert not made.receiver.book.counts


@pytest.mark.parametrize("transport", TRANSPORTS)
@settings(deadline=None, max_examples=25)
@given(case=cases(), piece_bytes=st.sampled_from((64, 500, 1 << 20)), long_run=st.sampled_from((1, 64, 1 << 14)))
def test_any_layout_becomes_any_other(transport: str, case: Case, piece_bytes: int, long_run: int) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        patch.setattr(pieces, "FRAME_BYTES", 3 * piece_bytes)
        for name in ("LONG_RUN_BYTES", "LONG_COPY_BYTES"):
            patch.setattr(places, name, long_run)
        patch.setattr(places, "FEW", 1)
        hand_over(case, transport, Path(directory))
