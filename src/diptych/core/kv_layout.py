"""How KV bytes lie in memory, and the frozen plan by which they change places.

One worker's KV memory is one buffer, addressed as

    [layer][block][K or V][kv_head][slot][head_dim]

so that within a layer one block is one contiguous range, a KV head of a block is contiguous (which a
later cut by heads needs), and an engine can gather (block, head) rows without a transpose.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The cut of a KV cache. Two workers may exchange pages as they are if their digests are equal."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # a key of DTYPE_BYTES
    block_size: int  # tokens per block
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown KV dtype {self.dtype!r}; one of {sorted(DTYPE_BYTES)}")
        sizes = (self.num_layers, self.num_kv_heads, self.head_dim, self.block_size)
        if min(*sizes, self.tensor_parallel, self.pipeline_parallel) < 1:
            raise ValueError(f"every size of a KV layout is at least 1: {self}")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer, K and V together."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers (the figure to hold against a link's bandwidth)."""
        return self.block_bytes // self.block_size * self.num_layers

    @property
    def digest(self) -> str:
        """A short name for this exact layout."""
        canonical = repr(sorted(asdict(self).items())).encode()
        return hashlib.blake2b(canonical, digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class KVMemory:
    """One worker's KV cache as bytes: `buffer` has num_layers * num_blocks * block_bytes of them."""

    layout: KVLayout
    num_blocks: int
    buffer: memoryview = field(repr=False)

    def __post_init__(self) -> None:
        wanted = self.layout.num_layers * self.num_blocks * self.layout.block_bytes
        if self.buffer.nbytes != wanted:
            raise ValueError(f"KV buffer has {self.buffer.nbytes} bytes, the layout wants {wanted}")

    def layer(self, index: int) -> memoryview:
        """The bytes of one layer: num_blocks * block_bytes of them."""
        size = self.num_blocks * self.layout.block_bytes
        return self.buffer[index * size : (index + 1) * size]


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Copy `length` bytes; offsets count from the start of the layer on either side."""

    source_offset: int
    target_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class LayerTransfer:
    """What one source rank sends to one target rank for one layer."""

    layer: int
    source_rank: int
    target_rank: int
    ranges: tuple[ByteRange, ...]


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """Everything that a piece of a hand-off moves: for logical blocks [first_block, first_block +
    num_blocks) of a sequence, per layer, the ranges to copy. Computed before anything moves."""

    source_digest: str
    target_digest: str
    first_block: int
    num_blocks: int
    layers: tuple[LayerTransfer, ...]
