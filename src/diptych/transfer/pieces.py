"""In what portions a plan's bytes are moved.

A frame is a message and the units (`policy.digest_units`) that it announces, consecutive ones of one pair of
ranks in one layer: large, since it costs both sides a few system calls, but not the whole layer, so that the
target can verify one while the next is being written, and several streams can share the work.

A piece is what is copied in one go, and hashed while it is still in the core's cache, which takes about half
the time of hashing it before or later.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diptych.core.kv_layout import ByteRange, KVLayout, LayerTransfer, TransferPlan
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import HeadPair, head_pairs
from diptych.transfer.places import LONG_RUN_BYTES, Numbers, Places, Span

FRAME_BYTES = 1 << 20
PIECE_BYTES = 256 << 10


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

    `spans` is where each of them lies at the source, if that is in one run each. `copies` are the runs that are
    contiguous on both sides (from, to at the source, from, to at the target), if they are long enough to be
    copied one by one."""

    source: Places
    target: Places
    unit_ends: tuple[int, ...]
    spans: list[Span] | None
    copies: list[tuple[int, int, int, int]] | None


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    first_group: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.source.nbytes for piece in self.pieces)


class PairFrames:
    """The frames of one pair of a plan. All layers share them; they are made when the first one is wanted."""

    def __init__(self, units: Units, ranges: Sequence[ByteRange]) -> None:
        self._units = units
        self._ranges = ranges
        self._parts = units.cut(units.groups, FRAME_BYTES)
        self._frames: list[Frame] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Frame:
        with self._lock:
            if not self._frames:
                self._frames = self._cut()
            return self._frames[index]

    def _cut(self) -> list[Frame]:
        spans = [(span.source_offset, span.target_offset, span.length) for span in self._ranges]
        source, target, lengths = np.array(spans, dtype=np.int64).reshape(-1, 3).T
        whole = _Both(Places(source, lengths), Places(target, lengths), source, target, np.cumsum(lengths))
        return [self._frame(groups, whole) for groups in self._parts]

    def _frame(self, groups: range, whole: _Both) -> Frame:
        pieces = []
        for part in self._units.cut(groups, PIECE_BYTES):
            start, stop = self._units.end(part.start - 1), self._units.end(part.stop - 1)
            source, ends = whole.source.part(start, stop), self._units.ends(part)
            target, copies = whole.target.part(start, stop), whole.copies(start, stop)
            pieces.append(Piece(source, target, tuple(ends), source.spans(ends), copies))
        return Frame(groups.start, tuple(pieces))


@dataclass(frozen=True, slots=True, eq=False)
class _Both:
    """A pair's ranges as arrays: of each range, where it begins on both sides, and where it ends in the stream."""

    source: Places
    target: Places
    source_starts: Numbers
    target_starts: Numbers
    ends: Numbers

    def copies(self, start: int, stop: int) -> list[tuple[int, int, int, int]] | None:
        """Bytes [start, stop) of the stream as contiguous copies; None if they are short."""
        first, last = np.searchsorted(self.ends, (start, stop - 1), side="right")
        if stop - start < LONG_RUN_BYTES * (last + 1 - first):
            return None
        ends = np.minimum(self.ends[first : last + 1], stop)
        begins = np.concatenate(([start], ends[:-1]))
        lengths = ends - begins
        into = np.zeros_like(begins)  # the first range may have begun before
        into[0] = start - (self.ends[first - 1] if first else 0)
        ours, theirs = (starts[first : last + 1] + into for starts in (self.source_starts, self.target_starts))
        columns = (ours, ours + lengths, theirs, theirs + lengths)
        return list(zip(*(column.tolist() for column in columns), strict=True))


class PlanFrames:
    """A plan's frames. Raises ValueError if it is not a plan from this layout to the ticket's, or if it cuts a
    unit in two."""

    def __init__(self, plan: TransferPlan, source: KVLayout, claims: TicketClaims) -> None:
        target = claims.layout
        if (plan.source_digest, plan.target_digest) != (source.digest, target.digest):
            raise ValueError("this plan is for other layouts than those of the two sides")
        self.plan = plan
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
            PairFrames(Units.of(source, target, pair, tokens), transfer.ranges)
            for pair, transfer in zip(pairs, first, strict=False)
        ]

    def of_layer(self, layer: int) -> Iterator[tuple[int, LayerTransfer, PairFrames]]:
        """(number of the pair, who to whom, frames) for each pair of ranks."""
        for pair, (transfer, frames) in enumerate(zip(self._transfers.get(layer, ()), self._pairs, strict=False)):
            yield pair, transfer, frames
