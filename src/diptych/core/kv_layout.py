"""How KV bytes lie in memory, and the frozen plan by which they change places.

Each rank of a worker has one buffer, addressed as

    [layer of the rank][block][K or V][KV head of the rank][slot][head_dim]

so that within a layer one block is one contiguous range, a KV head of a block is contiguous (it can
be cut out as one piece), and an engine can gather (block, head) rows without a transpose. Multi-head
latent attention (MLA) keeps one latent vector per token instead: `[layer][block][slot][latent_dim]`.

All ranks of a worker use the same block table. A worker is cut into ranks in this order, the last one
changing fastest (the order in which vLLM and Megatron-LM number them):

    rank = (data_parallel rank * pipeline_parallel + stage) * tensor_parallel + tensor rank

    cut                  what a rank holds of a sequence
    tensor_parallel      KV heads [i * n, (i + 1) * n); with more ranks than heads, neighbours hold the same
    pipeline_parallel    a run of layers; the first stages have one more if they do not divide evenly
    data_parallel        everything or nothing: a sequence lives on one data-parallel rank
    expert_parallel      as without: experts hold no KV
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from diptych.core.blocks import BlockId

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The shape of a model's KV cache and its cut. Two workers may exchange pages as they are if their
    digests are equal; otherwise `policy.resharding` says how, if at all.

    Either `num_kv_heads` and `head_dim` are given, or `latent_dim` (MLA: the whole vector that a layer
    keeps per token, kv_lora_rank + qk_rope_head_dim elements). Raises ValueError for a cut that does not
    come out even: heads must divide by tensor ranks, or tensor ranks by heads.
    """

    num_layers: int
    num_kv_heads: int = 0
    head_dim: int = 0
    latent_dim: int = 0
    dtype: str  # a key of DTYPE_BYTES
    block_size: int  # tokens per block
    tensor_parallel: int = 1  # within one data-parallel rank
    pipeline_parallel: int = 1
    data_parallel: int = 1  # of the attention
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown KV dtype {self.dtype!r}; one of {sorted(DTYPE_BYTES)}")
        if self.latent_dim and (self.num_kv_heads or self.head_dim):
            raise ValueError(f"a KV layout has heads or latents, not both: {self}")
        vector = (self.latent_dim,) if self.latent_dim else (self.num_kv_heads, self.head_dim)
        cut = (self.tensor_parallel, self.pipeline_parallel, self.data_parallel, self.expert_parallel)
        if min(self.num_layers, self.block_size, *vector, *cut) < 1:
            raise ValueError(f"every size of a KV layout is at least 1: {self}")
        if self.pipeline_parallel > self.num_layers:
            raise ValueError(f"{self.num_layers} layers are too few for {self.pipeline_parallel} pipeline stages")
        if self.heads % self.tensor_parallel and self.tensor_parallel % self.heads:
            raise ValueError(f"{self.heads} KV heads cannot be cut evenly for {self.tensor_parallel} tensor ranks")

    @property
    def heads(self) -> int:
        """What tensor parallelism can cut: KV heads, or the one latent."""
        return self.num_kv_heads or 1

    @property
    def planes(self) -> int:
        """Vectors that one head keeps per token: K and V, or the latent alone."""
        return 1 if self.latent_dim else 2

    @property
    def replication(self) -> int:
        """How many tensor ranks hold the same heads."""
        return max(1, self.tensor_parallel // self.heads)

    @property
    def heads_per_rank(self) -> int:
        return max(1, self.heads // self.tensor_parallel)

    @property
    def world_size(self) -> int:
        """Ranks of a worker. (Expert parallelism spreads experts over these same ranks.)"""
        return self.data_parallel * self.pipeline_parallel * self.tensor_parallel

    @property
    def cut(self) -> str:
        """In short, for people: "tp4 ep4"; empty for a single rank."""
        sizes = {
            "tp": self.tensor_parallel,
            "pp": self.pipeline_parallel,
            "dp": self.data_parallel,
            "ep": self.expert_parallel,
        }
        return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)

    def rank(self, data_rank: int, stage: int, tensor_rank: int) -> int:
        """The rank at these coordinates."""
        return (data_rank * self.pipeline_parallel + stage) * self.tensor_parallel + tensor_rank

    def stage_of(self, layer: int) -> int:
        """The pipeline stage that holds a layer."""
        size, longer = divmod(self.num_layers, self.pipeline_parallel)
        if layer < longer * (size + 1):
            return layer // (size + 1)
        return (layer - longer) // size

    def layers_of(self, rank: int) -> range:
        """The layers that a rank holds, in the model's numbering."""
        self._check_rank(rank)
        stage = rank // self.tensor_parallel % self.pipeline_parallel
        size, longer = divmod(self.num_layers, self.pipeline_parallel)
        first = stage * size + min(stage, longer)
        return range(first, first + size + (stage < longer))

    def heads_of(self, rank: int) -> range:
        """The KV heads that a rank holds, in the model's numbering."""
        self._check_rank(rank)
        first = rank % self.tensor_parallel // self.replication * self.heads_per_rank
        return range(first, first + self.heads_per_rank)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"there is no rank {rank} among {self.world_size}")

    @property
    def vector_bytes(self) -> int:
        """Bytes of one token's K (or V, or latent) in one head and layer."""
        return (self.latent_dim or self.head_dim) * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer of one rank, K and V together."""
        return self.planes * self.heads_per_rank * self.block_size * self.vector_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers and heads, once each (the figure to hold against a link's
        bandwidth)."""
        return self.planes * self.heads * self.vector_bytes * self.num_layers

    def offset(self, plane: int, head: int, slot: int = 0) -> int:
        """Where in a block a vector lies, in bytes. `head` counts from the rank's first one."""
        return ((plane * self.heads_per_rank + head) * self.block_size + slot) * self.vector_bytes

    @property
    def digest(self) -> str:
        """A short name for this exact layout."""
        return _digest(self)


@functools.lru_cache(maxsize=64)
def _digest(layout: KVLayout) -> str:
    canonical = repr(sorted(asdict(layout).items())).encode()
    return hashlib.blake2b(canonical, digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class SequenceKV:
    """Where one sequence's KV lies in a worker: `blocks[i]` is its logical block `first_block + i`, on
    every rank of the data-parallel rank that holds the sequence."""

    layout: KVLayout
    blocks: Sequence[BlockId]
    first_block: int = 0
    data_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.data_rank < self.layout.data_parallel:
            raise ValueError(f"there is no data-parallel rank {self.data_rank} among {self.layout.data_parallel}")

    @property
    def tokens(self) -> range:
        """The tokens that have a place in these blocks."""
        size = self.layout.block_size
        return range(self.first_block * size, (self.first_block + len(self.blocks)) * size)

    def place(self, token: int) -> tuple[BlockId, int]:
        """Block and slot of a token."""
        block, slot = divmod(token, self.layout.block_size)
        return self.blocks[block - self.first_block], slot


class PrivateMemory:
    """Zeroed bytes that only this process sees (a `core.ports.KVBytes`)."""

    descriptor = None

    def __init__(self, nbytes: int) -> None:
        self._content = bytearray(nbytes)

    @property
    def buffer(self) -> memoryview:
        return memoryview(self._content)


@dataclass(frozen=True, slots=True)
class KVMemory:
    """One rank's KV cache as bytes: `buffer` has num_blocks * block_bytes of them for each of its layers."""

    layout: KVLayout
    num_blocks: int
    buffer: memoryview = field(repr=False)
    rank: int = 0
    _held: range = field(init=False, repr=False, compare=False)  # what `layer`, often called, needs of the layout
    _layer_bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_held", self.layout.layers_of(self.rank))
        object.__setattr__(self, "_layer_bytes", self.num_blocks * self.layout.block_bytes)
        wanted = len(self._held) * self._layer_bytes
        if self.buffer.nbytes != wanted:
            raise ValueError(f"KV buffer has {self.buffer.nbytes} bytes, the layout wants {wanted}")

    def layer(self, index: int) -> memoryview:
        """The bytes of one layer, by its number in the model: num_blocks * block_bytes of them.

        Raises ValueError for a layer that this rank does not hold."""
        if index not in self._held:
            raise ValueError(f"rank {self.rank} holds layers {self._held[0]} to {self._held[-1]}, not {index}")
        start = (index - self._held.start) * self._layer_bytes
        return self.buffer[start : start + self._layer_bytes]


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
    """Everything that a piece of a hand-off moves: the KV of tokens [first_token, first_token + num_tokens)
    of a sequence, per layer (ascending) and pair of ranks the ranges to copy. Computed before anything moves.

    Within a `LayerTransfer` the bytes come in logical order, by token run (see
    `policy.resharding.token_runs`), then K before V, then head: the order follows from the two layouts
    alone, so a receiver can take them from a stream knowing only its own block table.
    """

    source_digest: str
    target_digest: str
    first_token: int
    num_tokens: int
    first_block: int  # the target's logical blocks [first_block, first_block + num_blocks) hold these tokens
    num_blocks: int
    layers: tuple[LayerTransfer, ...]
