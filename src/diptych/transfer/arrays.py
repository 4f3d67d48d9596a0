"""KV cache as its owners hold it (numpy arrays, torch tensors, our own memory), seen as pages of bytes.

Nothing is copied and torch is not imported: tensors are recognised by what they can do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diptych.core.kv_layout import KVLayout, KVMemory

# numpy has no bfloat16; its bits travel as uint16.
NUMPY_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "uint8": "uint8"}


@dataclass(frozen=True, slots=True)
class KVPages:
    """One rank's pages that do not lie in one buffer (a `core.ports.PageSource`): `layers` has for each layer
    num_blocks * block_bytes bytes."""

    layout: KVLayout
    num_blocks: int
    layers: Mapping[int, memoryview]

    def layer(self, index: int) -> memoryview:
        return self.layers[index]


def layers_of(pages: KVMemory | KVPages) -> Collection[int]:
    """The layers that are here."""
    return pages.layers.keys() if isinstance(pages, KVPages) else pages.layout.layers_of(pages.rank)


def as_pages(kv: Any, layout: KVLayout, rank: int = 0) -> KVMemory | KVPages:
    """See `kv` as the pages of one rank of `layout`. It is one of

    - a KVMemory
    - an array [layers of the rank, blocks, ...]
    - a sequence with an array [blocks, ...] for each layer of the rank, or a mapping from some layers' numbers
      to such arrays

    where one block of one layer, `...`, is [K or V, kv_head, slot, head_dim] (`core.kv_layout`). An array is
    what numpy takes for one without copying, or a torch tensor in main memory; C-contiguous, of the layout's
    dtype (bfloat16 also as uint16). Raises ValueError if it is not.
    """
    if isinstance(kv, KVMemory):
        if (kv.layout, kv.rank) != (layout, rank):
            raise ValueError(f"KV of rank {kv.rank} of {kv.layout} cannot be pushed as rank {rank} of {layout}")
        return kv
    held = layout.layers_of(rank)
    if isinstance(kv, Mapping):
        arrays = dict(kv)
    else:
        arrays = dict(enumerate(kv, start=held.start))
        if len(arrays) != len(held):
            raise ValueError(f"{len(arrays)} layers of KV, rank {rank} of the layout has {len(held)}")
    pages = {layer: _bytes(array, layout) for layer, array in arrays.items()}
    if not pages or not all(layer in held for layer in pages):
        raise ValueError(f"KV of layers {sorted(pages)}, rank {rank} of the layout has {held[0]} to {held[-1]}")
    sizes = {len(content) for content in pages.values()}
    if len(sizes) != 1:
        raise ValueError("the layers have different numbers of blocks")
    return KVPages(layout, sizes.pop() // layout.block_bytes, pages)


def blocks_as_array(memory: KVMemory, layer: int, blocks: Sequence[int]) -> npt.NDArray[Any]:
    """Some blocks of one layer, [len(blocks), K or V, kv_head, slot, head_dim] (MLA: [len(blocks), 1, 1,
    slot, latent_dim]): a view if they are consecutive, else a copy. bfloat16 comes as uint16."""
    layout = memory.layout
    content = np.frombuffer(memory.layer(layer), dtype=NUMPY_DTYPES[layout.dtype])
    vectors = layout.planes, layout.heads_per_rank, layout.block_size, layout.latent_dim or layout.head_dim
    paged = content.reshape(memory.num_blocks, *vectors)
    first, count = (blocks[0] if blocks else 0), len(blocks)
    if list(blocks) == list(range(first, first + count)):
        return paged[first : first + count]
    return paged[list(blocks)]


def _bytes(array: Any, layout: KVLayout) -> memoryview:
    """One layer's bytes, where they are."""
    dtype = None
    if hasattr(array, "new_empty"):  # a torch tensor: seen as bytes, since numpy does not know every dtype
        dtype = str(array.dtype).removeprefix("torch.")
        array = array.detach().view(array.new_empty(0).byte().dtype)
    try:
        content = np.asarray(array)
    except TypeError as error:
        raise ValueError(f"KV that is not in main memory: {error}") from error
    dtype = dtype or str(content.dtype)
    if dtype not in (layout.dtype, NUMPY_DTYPES[layout.dtype]):
        raise ValueError(f"KV of dtype {dtype}, the layout has {layout.dtype}")
    if not content.flags.c_contiguous:
        raise ValueError("KV whose layers are not contiguous")
    if not content.nbytes or content.nbytes != content.shape[0] * layout.block_bytes:
        raise ValueError(f"a layer of shape {content.shape} does not consist of blocks of {layout.block_bytes} bytes")
    return content.reshape(-1).view(np.uint8).data
