"""Starts engines of several ranks, and drives them like any other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch_harness import NUM_BLOCKS, EngineHarness, checkpoint

from diptych.core.blocks import blocks_for
from diptych.core.kv_layout import KVMemory
from diptych.core.sequence import Sequence
from diptych.core.settings import EngineSettings, ParallelSettings
from diptych.engine.torch_engine.parallel_engine import ParallelEngine
from diptych.transfer.memory import SharedMemory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Ranks:
    """A started engine, and the model it serves."""

    model: Path
    engine: ParallelEngine
    memories: tuple[KVMemory, ...]


@contextlib.contextmanager
def started(model: str | Path, parallel: ParallelSettings, dtype: str = "auto") -> Iterator[Ranks]:
    """An engine with KV memory; ended afterwards."""
    path = model if isinstance(model, Path) else checkpoint(model)
    segments: list[SharedMemory] = []

    def allocate(nbytes: int) -> SharedMemory:
        segments.append(SharedMemory(nbytes))
        return segments[-1]

    with contextlib.closing(
        ParallelEngine.load(EngineSettings(model=str(path), dtype=dtype, parallel=parallel))
    ) as engine:
        yield Ranks(path, engine, engine.allocate_kv(NUM_BLOCKS, allocate))
    for segment in segments:
        with contextlib.suppress(BufferError):  # a test may still hold a view
            segment.close()


class ParallelHarness(EngineHarness):
    """May be made anew over the same engine: all blocks are full of NaN again."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks.engine)
        for memory in ranks.memories:
            torch.frombuffer(memory.buffer, dtype=torch.uint8).fill_(0xFF)


def kv_of(memory: KVMemory, layer: int, sequence: Sequence) -> Tensor:
    """A sequence's keys and values in one layer of one rank, [K or V, kv_head, slot, head_dim], with the unused
    slots of its last block."""
    layout = memory.layout
    blocks = sequence.block_table[: blocks_for(sequence.num_computed_tokens, layout.block_size)]
    content = torch.frombuffer(memory.layer(layer), dtype=DTYPES[layout.dtype])
    paged = content.view(-1, 2, layout.heads_per_rank, layout.block_size, layout.head_dim)[blocks]
    return paged.permute(1, 2, 0, 3, 4).flatten(2, 3)
