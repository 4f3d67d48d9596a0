"""Digests of pages: XXH3-64 over a block's bytes in one layer.

Not a MAC: channels are authenticated, this finds accidents (a stale, torn or foreign page). XXH3 reads
several GB/s on one core, so that checking costs little beside computing the page.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from diptych.core.blocks import BlockId
from diptych.core.kv_layout import KVMemory


def block_digest(page: memoryview) -> int:
    """64-bit digest of one block in one layer."""
    return int(xxhash.xxh3_64_intdigest(page))


def layer_digests(memory: KVMemory, layer: int, blocks: Iterable[BlockId]) -> list[int]:
    """Digests of some blocks' bytes as they are now."""
    bytes_of_layer, size = memory.layer(layer), memory.layout.block_bytes
    return [block_digest(bytes_of_layer[block * size : (block + 1) * size]) for block in blocks]
