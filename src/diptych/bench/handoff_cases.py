"""What `bench.handoff_bench` measures: shapes of KV, and how much of it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from diptych.core.blocks import BlockId
from diptych.core.kv_layout import KVLayout, SequenceKV

MIB = 1 << 20
NUM_LAYERS = 8
EQUAL = ("64 KiB pages, scattered", "16 KiB pages, scattered")  # what re-sharded ones are held against


@dataclass(frozen=True, slots=True)
class Shape:
    """How KV lies on both sides. 8 KV heads of 128 in bfloat16, and blocks of 16 tokens, make pages of 64 KiB."""

    source: KVLayout
    target: KVLayout
    scattered: bool  # block tables


def _layout(heads: int = 8, **cut: int) -> KVLayout:
    sizes = {"num_layers": NUM_LAYERS, "head_dim": 128, "block_size": 16, **cut}
    return KVLayout(num_kv_heads=heads, dtype="bfloat16", **sizes)


WIDE, NARROW = _layout(), _layout(heads=2)
SHAPES = {
    "64 KiB pages, consecutive": Shape(WIDE, WIDE, scattered=False),
    EQUAL[0]: Shape(WIDE, WIDE, scattered=True),
    EQUAL[1]: Shape(NARROW, NARROW, scattered=True),
    "TP 4 -> 1, scattered": Shape(_layout(tensor_parallel=4), WIDE, scattered=True),
    "TP 1 -> 4, scattered": Shape(WIDE, _layout(tensor_parallel=4), scattered=True),
    "block 16 -> 32, scattered": Shape(WIDE, _layout(block_size=32), scattered=True),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a shape, and how much moves."""

    mib: int
    shape: str
    rounds: int

    @property
    def layouts(self) -> Shape:
        return SHAPES[self.shape]

    @property
    def num_tokens(self) -> int:
        return self.mib * MIB // self.layouts.source.token_bytes

    @property
    def source(self) -> SequenceKV:
        return SequenceKV(self.layouts.source, self._table(self.layouts.source, 1))

    @property
    def target(self) -> SequenceKV:
        return SequenceKV(self.layouts.target, self._table(self.layouts.target, 2))

    def _table(self, layout: KVLayout, seed: int) -> list[BlockId]:
        """A block table over all blocks of the memory."""
        blocks = list(range(self.num_tokens // layout.block_size))
        if self.layouts.scattered:
            random.Random(seed).shuffle(blocks)
        return blocks


CASES = tuple(Case(mib, shape, rounds) for mib, rounds in ((1, 61), (16, 31), (256, 9)) for shape in SHAPES)
