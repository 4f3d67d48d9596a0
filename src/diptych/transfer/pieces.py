"""In what portions a plan's bytes are moved.

A frame is what one message announces: consecutive units (`policy.digest_units`) of one pair of ranks, in one
layer or, where these are small and leave together, in several. It is large, since it costs both sides a few system
calls, but not everything, so that the target can verify one while the next is being written, and several streams
can share the work.

It consists of pieces: what is copied in one go, and hashed while it is still in a cache, which takes about half
the time of hashing it before or later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diptych.core.kv_layout import ByteRange, KVLayout, LayerTransfer, TransferPlan
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import HeadPair, head_pairs
from diptych.transfer.places import Copy, Places, Span, copies

FRAME_BYTES = 4 << 20
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Units:
    """The units of one pair over some tokens, in any layer: as one stream of bytes, group after group."""

    tokens: range
    group: int  # tokens; groups begin at multiples of it
    token_bytes: int  # of the pair's heads, in one layer

    @classmethod
    def of(cls, source: KVLayout, target: KVLayout, pair: HeadPair, tokens: range) -> Units:
        group = math.lcm(source.block_size, target.block_size)
        return cls(tokens, group, source.planes * len(pair.heads) * source.vector_bytes)

    @property
    def groups(self) -> range:
        return range(self.tokens.start // self.group, -(-self.tokens.stop // self.group))

    def end(self, group: int) -> int:
        """Where a group ends in the stream (and the next one begins)."""
        token = min((group + 1) * self.group, self.tokens.stop)
        return max(token - self.tokens.start, 0) * self.token_bytes

    def ends(self, groups: range) -> list[int]:
        """Where these groups end, counted from where the first of them begins."""
        begin = self.end(groups.start - 1)
        return [self.end(group) - begin for group in groups]

    def cut(self, groups: range, nbytes: int) -> list[range]:
        """The same groups in parts of at most `nbytes` (but at least one group)."""
        step = max(nbytes // (self.group * self.token_bytes), 1)
        return [groups[start : start + step] for start in range(0, len(groups), step)]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some units on their way: where they lie at the source and at the target, and where each of them ends.

    `spans` is where each of them lies at the source, if that is in one run each. `copies` is how to bring them
    over one by one, if those are not too many."""

    first_group: int
    source: Places
    target: Places
    unit_ends: list[int]
    spans: list[Span] | None
    copies: list[Copy] | None


class PairPieces:
    """The pieces of one pair of a plan. All layers share them; each is made when it is first wanted, so that the first
    frame can leave before the last one has been thought of."""

    def __init__(self, units: Units, ranges: Sequence[ByteRange]) -> None:
        self._units = units
        self._ranges = ranges
        self._sides: tuple[Places, Places] | None = None
        self._parts = units.cut(units.groups, PIECE_BYTES)
        self._per_frame = max(FRAME_BYTES // PIECE_BYTES, 1)
        self._pieces: dict[int, Piece] = {}

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def nbytes(self) -> int:
        """In one layer."""
        return self._units.end(self._units.groups.stop - 1)

    @property
    def num_frames(self) -> int:
        return -(-len(self) // self._per_frame)

    def frame(self, index: int) -> list[Piece]:
        """The pieces of one frame."""
        first = index * self._per_frame
        return [self[number] for number in range(first, min(first + self._per_frame, len(self)))]

    def __getitem__(self, index: int) -> Piece:
        piece = self._pieces.get(index)
        if piece is None:  # (two threads may both make it)
            piece = self._pieces[index] = self._cut(self._parts[index])
        return piece

    def _cut(self, groups: range) -> Piece:
        if self._sides is None:
            spans = [(span.source_offset, span.target_offset, span.length) for span in self._ranges]
            source, target, lengths = np.array(spans, dtype=np.int64).reshape(-1, 3).T
            self._sides = Places(source, lengths), Places(target, lengths)
        start, stop = self._units.end(groups.start - 1), self._units.end(groups.stop - 1)
        ours, theirs = (side.part(start, stop) for side in self._sides)
        ends = self._units.ends(groups)
        return Piece(groups.start, ours, theirs, ends, ours.spans(ends), copies(ours, theirs))


class PlanPieces:
    """A plan's pieces. Raises ValueError if it is not a plan from this layout to the ticket's, or if it cuts a
    unit in two."""

    def __init__(self, plan: TransferPlan, source: KVLayout, claims: TicketClaims) -> None:
        target = claims.layout
        if (plan.source_digest, plan.target_digest) != (source.digest, target.digest):
            raise ValueError("this plan is for other layouts than those of the two sides")
        self.plan = plan
        self._target = target
        tokens = range(plan.first_token, plan.first_token + plan.num_tokens)
        group = math.lcm(source.block_size, target.block_size)
        begins = tokens.start % group == 0 or tokens.start == claims.first_block * target.block_size
        if tokens and not (begins and (tokens.stop % group == 0 or tokens.stop == claims.num_tokens)):
            raise ValueError(f"{tokens} do not begin and end at multiples of {group} tokens, or where the request does")
        pairs = head_pairs(source, target) if plan.layers and tokens else []
        self._transfers: dict[int, list[LayerTransfer]] = {}
        for transfer in plan.layers:
            self._transfers.setdefault(transfer.layer, []).append(transfer)
        first = next(iter(self._transfers.values()), [])
        self._pairs = [
            PairPieces(Units.of(source, target, pair, tokens), transfer.ranges)
            for pair, transfer in zip(pairs, first, strict=False)
        ]

    def of_layers(self, layers: Sequence[int]) -> Iterator[tuple[int, list[LayerTransfer], PairPieces]]:
        """(number of the pair, who to whom, pieces) for each pair of ranks, and one or more of the layers: as many
        consecutive ones on one rank of the target as make a frame."""
        for run in self._runs(layers):
            for pair, pieces in enumerate(self._pairs):
                step = max(FRAME_BYTES // pieces.nbytes, 1)
                transfers = [self._transfers[layer][pair] for layer in run]
                for start in range(0, len(run), step):
                    yield pair, transfers[start : start + step], pieces

    def _runs(self, layers: Sequence[int]) -> Iterator[list[int]]:
        """Consecutive layers of one pipeline stage of the target."""
        run: list[int] = []
        for layer in layers:
            if run and (layer != run[-1] + 1 or self._target.stage_of(layer) != self._target.stage_of(run[-1])):
                yield run
                run = []
            if layer in self._transfers:
                run.append(layer)
        if run:
            yield run
