"""Digests of pages: XXH3-64 over a block's bytes in one layer, 8 bytes each, one after the other.

Not a MAC: channels are authenticated, this finds accidents (a stale, torn or foreign page). XXH3 reads
tens of GB/s out of the CPU's caches, so that checking costs little beside computing the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from diptych.core.blocks import BlockId
from diptych.core.ports import PageSource

DIGEST_BYTES = 8

Pages = npt.NDArray[np.uint8]

_digest: Callable[[Any], bytes] = xxhash.xxh3_64_digest


def layer_pages(memory: PageSource, layer: int) -> Pages:
    """One layer's bytes, a row for each block."""
    return np.frombuffer(memory.layer(layer), dtype=np.uint8).reshape(-1, memory.layout.block_bytes)


def page_digests(pages: Iterable[Pages]) -> bytes:
    """Digests of some pages (rows of `layer_pages`), in their order."""
    return b"".join(map(_digest, pages))


def layer_digests(memory: PageSource, layer: int, blocks: Iterable[BlockId]) -> bytes:
    """Digests of some blocks' bytes as they are now."""
    return page_digests(map(layer_pages(memory, layer).__getitem__, blocks))
