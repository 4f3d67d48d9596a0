"""From where a sequence's KV lies in two workers to the frozen plan of what moves.

    equal layouts                                   KV heads 0-3 from two tensor ranks to one

    source blocks   7  8  9 | 3                     rank 0, block 7    K0 K1 V0 V1
    target blocks  20 21 22 | 5                     rank 1, block 7    K2 K3 V2 V3
                   └──one──┘ └one┘  ranges          rank 0, block 20   K0 K1 K2 K3 V0 V1 V2 V3
                                                                       └─┬─┘ └─┬─┘ └─┬─┘ └─┬─┘
                                                                      rank 0  rank 1  0     1

Tokens are cut into runs that lie in one block on both sides. For each pair of ranks that share heads, a
run is one contiguous piece per K or V and head; pieces that follow each other on both sides become one
range. Nothing of that depends on the layer, so all layers share the same ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diptych.core.blocks import BlockId, blocks_for
from diptych.core.kv_layout import ByteRange, KVLayout, LayerTransfer, SequenceKV, TransferPlan

_SHAPE = ("num_layers", "num_kv_heads", "head_dim", "latent_dim", "dtype")

_Run = tuple[int, int, int]  # offset of the first token's first vector at the source, at the target; tokens


@dataclass(frozen=True, slots=True)
class HeadPair:
    """The heads that one target tensor rank takes from one of the source's shards, in every layer.

    A shard is what `replication` tensor ranks hold alike; `reader` counts the pairs of a shard."""

    source_shard: int
    target_tensor_rank: int
    heads: range  # in the model's numbering
    reader: int


def incompatibilities(source: KVLayout, target: KVLayout) -> list[str]:
    """Why KV of one layout cannot become KV of the other, however it is cut. Empty: it can."""
    return [
        f"{name} is {getattr(source, name)!r} on one side and {getattr(target, name)!r} on the other"
        for name in _SHAPE
        if getattr(source, name) != getattr(target, name)
    ]


def plan_transfer(
    source: KVLayout,
    target: KVLayout,
    source_blocks: Sequence[BlockId],
    target_blocks: Sequence[BlockId],
    *,
    first_block: int,
) -> TransferPlan:
    """Plan moving whole blocks [first_block, first_block + len(source_blocks)) of one sequence between
    layouts of one block size. `source_blocks[i]` and `target_blocks[i]` hold the same logical block.

    Raises ValueError if the layouts are incompatible, or the tables do not match.
    """
    if source.block_size != target.block_size:
        raise ValueError(f"blocks of {source.block_size} and of {target.block_size} tokens: plan by tokens instead")
    if len(source_blocks) != len(target_blocks):
        raise ValueError(f"{len(source_blocks)} source blocks for {len(target_blocks)} target blocks")
    there = SequenceKV(target, target_blocks, first_block)
    return plan_resharding(SequenceKV(source, source_blocks, first_block), there, there.tokens)


def plan_resharding(source: SequenceKV, target: SequenceKV, tokens: range) -> TransferPlan:
    """Plan moving the KV of `tokens` of one sequence, which the target lacks, between any two layouts.

    Every byte that a target rank holds of these tokens is written exactly once, and nothing else; by the
    fewest ranges that keep logical order. Plans of adjoining token ranges add up to the plan of the whole,
    so a prompt may be planned chunk by chunk, and each layer may leave alone. Of source ranks that hold the
    same heads all read equally much: each has as many readers, or else they take turns, layer by layer.

    Raises ValueError if the layouts are incompatible, or if `tokens` have no place in the blocks.
    """
    if reasons := incompatibilities(source.layout, target.layout):
        raise ValueError(f"KV cannot move between these layouts: {'; '.join(reasons)}")
    for side, kv in (("source", source), ("target", target)):
        if tokens and not (tokens.step == 1 and kv.tokens.start <= tokens.start < tokens.stop <= kv.tokens.stop):
            raise ValueError(f"tokens {tokens} have no place in the {side}'s blocks, which hold {kv.tokens}")
    size = target.layout.block_size
    first_block = tokens.start // size
    return TransferPlan(
        source_digest=source.layout.digest,
        target_digest=target.layout.digest,
        first_token=tokens.start,
        num_tokens=len(tokens),
        first_block=first_block,
        num_blocks=blocks_for(tokens.stop, size) - first_block if tokens else 0,
        layers=tuple(_layers(source, target, tokens)),
    )


def head_pairs(source: KVLayout, target: KVLayout) -> list[HeadPair]:
    """Who takes which heads from whom: every head of every target tensor rank exactly once."""
    pairs: list[HeadPair] = []
    readers = [0] * (source.tensor_parallel // source.replication)
    for tensor_rank in range(target.tensor_parallel):
        wanted = target.heads_of(tensor_rank)
        per_rank = source.heads_per_rank
        for shard in range(wanted.start // per_rank, (wanted.stop - 1) // per_rank + 1):
            heads = range(max(wanted.start, shard * per_rank), min(wanted.stop, (shard + 1) * per_rank))
            pairs.append(HeadPair(shard, tensor_rank, heads, readers[shard]))
            readers[shard] += 1
    return pairs


def token_runs(tokens: range, source_block_size: int, target_block_size: int) -> Iterator[range]:
    """Cut `tokens` where a block ends on either side."""
    start = tokens.start
    while start < tokens.stop:
        stop = min(
            start + source_block_size - start % source_block_size,
            start + target_block_size - start % target_block_size,
            tokens.stop,
        )
        yield range(start, stop)
        start = stop


def _layers(source: SequenceKV, target: SequenceKV, tokens: range) -> Iterator[LayerTransfer]:
    ours, theirs = source.layout, target.layout
    pairs = head_pairs(ours, theirs)
    ranges = _ranges_of_pairs(source, target, tokens, pairs)
    # A shard of several ranks is one head, which `theirs.replication` ranks read.
    replication = ours.replication
    take_turns = theirs.replication % replication != 0
    for layer in range(ours.num_layers):
        source_base = ours.rank(source.data_rank, ours.stage_of(layer), 0)
        target_base = theirs.rank(target.data_rank, theirs.stage_of(layer), 0)
        for pair, spans in zip(pairs, ranges, strict=True):
            replica = (pair.reader + take_turns * layer) % replication
            source_rank = source_base + pair.source_shard * replication + replica
            yield LayerTransfer(layer, source_rank, target_base + pair.target_tensor_rank, spans)


def _ranges_of_pairs(
    source: SequenceKV, target: SequenceKV, tokens: range, pairs: Sequence[HeadPair]
) -> list[tuple[ByteRange, ...]]:
    """The ranges of each pair. Pairs that differ in their ranks only share them."""
    runs = _runs(source, target, tokens)
    known: dict[tuple[int, int, int], tuple[ByteRange, ...]] = {}
    result = []
    for pair in pairs:
        source_head = pair.heads.start % source.layout.heads_per_rank
        target_head = pair.heads.start % target.layout.heads_per_rank
        key = (source_head, target_head, len(pair.heads))
        if key not in known:
            known[key] = _ranges(runs, _Pieces(source.layout, target.layout, *key))
        result.append(known[key])
    return result


def _runs(source: SequenceKV, target: SequenceKV, tokens: range) -> list[_Run]:
    runs = list(token_runs(tokens, source.layout.block_size, target.layout.block_size))
    ours, theirs = (_addresses(kv, [run.start for run in runs]) for kv in (source, target))
    return list(zip(ours, theirs, map(len, runs), strict=True))


def _addresses(kv: SequenceKV, tokens: Sequence[int]) -> list[int]:
    """Where the first vectors of these tokens lie."""
    block_bytes, vector_bytes = kv.layout.block_bytes, kv.layout.vector_bytes
    places = map(kv.place, tokens)
    return [block * block_bytes + slot * vector_bytes for block, slot in places]


class _Pieces:
    """The pieces of a run for `num_heads` heads, which begin at these heads of the two ranks."""

    def __init__(self, source: KVLayout, target: KVLayout, source_head: int, target_head: int, num_heads: int) -> None:
        ours, theirs = source.offset(0, 1), target.offset(0, 1)  # from one head to the next
        planes = range(source.planes)
        starts = [(source.offset(plane, source_head), target.offset(plane, target_head)) for plane in planes]
        self._starts = [
            (source_start + head * ours, target_start + head * theirs)
            for source_start, target_start in starts
            for head in range(num_heads)
        ]
        self._vector_bytes = source.vector_bytes
        self._of_length: dict[int, list[ByteRange]] = {}

    def of(self, num_tokens: int) -> list[ByteRange]:
        """Offsets count from where the run's first vector lies; joined where the run fills both blocks."""
        pieces = self._of_length.get(num_tokens)
        if pieces is None:
            length = num_tokens * self._vector_bytes
            pieces = self._of_length[num_tokens] = []
            for source, target in self._starts:
                _append(pieces, ByteRange(source, target, length))
        return pieces


def _append(ranges: list[ByteRange], piece: ByteRange) -> None:
    """Add a piece: to the last range if it continues that on both sides, or as a new one."""
    if ranges:
        last = ranges[-1]
        source_end, target_end = last.source_offset + last.length, last.target_offset + last.length
        if (source_end, target_end) == (piece.source_offset, piece.target_offset):
            ranges[-1] = ByteRange(last.source_offset, last.target_offset, last.length + piece.length)
            return
    ranges.append(piece)


def _ranges(runs: Sequence[_Run], pieces: _Pieces) -> tuple[ByteRange, ...]:
    """All pieces of all runs. Between two runs, only the last piece of one and the first of the other can adjoin."""
    ranges: list[ByteRange] = []
    for source, target, num_tokens in runs:
        first, *others = [
            ByteRange(source + piece.source_offset, target + piece.target_offset, piece.length)
            for piece in pieces.of(num_tokens)
        ]
        _append(ranges, first)
        ranges += others
    return tuple(ranges)
