"""Digests of pages: XXH3-64 over a block's bytes in one layer, 8 bytes each, one after the other.

Not a MAC: channels are authenticated, this finds accidents (a stale, torn or foreign page). XXH3 reads
tens of GB/s out of the CPU's caches, so that checking costs little beside computing the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import xxhash

from diptych.core.blocks import BlockId
from diptych.core.ports import PageSource

DIGEST_BYTES = 8

_digest: Callable[[Any], bytes] = xxhash.xxh3_64_digest


def layer_digests(memory: PageSource, layer: int, blocks: Iterable[BlockId]) -> bytes:
    """Digests of some blocks' bytes as they are now."""
    pages = np.frombuffer(memory.layer(layer), dtype=np.uint8).reshape(-1, memory.layout.block_bytes)
    return b"".join(map(_digest, map(pages.__getitem__, blocks)))
