"""Many byte ranges of one layer at once: where a stream of bytes lies in memory, and moving it from and to there.

A hand-off between different cuts touches tens of thousands of short ranges, too many for a Python loop. So
ranges are arrays here; short ones are moved as rows of their largest common size, by one numpy call for all.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from diptych.core.errors import TransferError
from diptych.core.kv_layout import SequenceKV

LONG_RUN_BYTES = 16 << 10  # from here on, runs are worth being sent and received one by one
LONG_COPY_BYTES = 32 << 10  # from here on, a Python loop over copies is faster than moving every byte twice
FEW = 8  # runs or copies that cost less one by one than a single call for all, however short they are

Numbers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Span = tuple[int, int]  # from, to


class Places:
    """A stream of bytes in a rank's layer: `lengths[i]` bytes at `starts[i]`, one run after the other.

    Runs that adjoin are joined. Immutable, so threads may share it.
    """

    def __init__(self, starts: Numbers, lengths: Numbers) -> None:
        adjoin = starts[1:] == starts[:-1] + lengths[:-1]
        if adjoin.any():
            firsts = np.flatnonzero(np.concatenate(([True], ~adjoin)))
            starts, lengths = starts[firsts], np.add.reduceat(lengths, firsts)
        self.starts, self.lengths = starts, lengths
        self.ends: Numbers = lengths.cumsum()  # of the runs, in the stream
        self.nbytes = int(self.ends[-1]) if len(starts) else 0
        self._rows: tuple[int, int, Numbers] | None = None

    @functools.cached_property
    def _extent(self) -> Span:
        """From the first byte to the last, wherever they lie."""
        if not len(self.starts):
            return 0, 0
        return int(self.starts.min()), int((self.starts + self.lengths).max())

    @property
    def is_one(self) -> bool:
        """Whether all of it is one run."""
        return len(self.starts) == 1

    @property
    def are_long(self) -> bool:
        """Few enough runs to go through them one by one."""
        return len(self.starts) <= max(self.nbytes // LONG_RUN_BYTES, FEW)

    @functools.cached_property
    def runs(self) -> list[Span]:
        return list(zip(self.starts.tolist(), (self.starts + self.lengths).tolist(), strict=True))

    def spans(self, ends: Sequence[int]) -> list[Span] | None:
        """Where the units lie that end at `ends` of the stream; None if one of them is not in one run."""
        stops = np.asarray(ends, dtype=np.int64)
        begins = np.concatenate(([0], stops[:-1]))
        if (
            np.searchsorted(self.ends, begins, side="right") != np.searchsorted(self.ends, stops - 1, side="right")
        ).any():
            return None
        starts = self.locate(begins)
        return list(zip(starts.tolist(), (starts + stops - begins).tolist(), strict=True))

    def locate(self, positions: Numbers) -> Numbers:
        """Where bytes at these positions of the stream lie."""
        runs = np.searchsorted(self.ends, positions, side="right")
        return self.starts[runs] - (self.ends[runs] - self.lengths[runs]) + positions

    def part(self, start: int, stop: int) -> Places:
        """Bytes [start, stop) of the stream."""
        if (start, stop) == (0, self.nbytes):
            return self
        first, last = np.searchsorted(self.ends, (start, stop - 1), side="right")
        starts, lengths = self.starts[first : last + 1].copy(), self.lengths[first : last + 1].copy()
        skipped = start - (self.ends[first] - self.lengths[first])
        starts[0] += skipped
        lengths[0] -= skipped
        lengths[-1] -= self.ends[last] - stop
        return Places(starts, lengths)

    def check(self, nbytes: int) -> None:
        """Raises TransferError unless all of it lies within a layer of so many bytes."""
        first, last = self._extent
        if first < 0 or last > nbytes:
            raise TransferError(f"bytes {first} to {last} leave a layer of {nbytes}")

    def views(self, layer: memoryview) -> list[memoryview]:
        """The runs, where they are."""
        return [layer[start:stop] for start, stop in self.runs]

    def gather(self, layer: memoryview, into: memoryview) -> None:
        """Copy the stream out of a layer. (`into` has its size.)"""
        size, rows = self._row_index(len(layer))
        row = np.dtype((np.void, size))
        np.take(np.frombuffer(layer, row), rows, out=np.frombuffer(into, row), mode="clip")

    def scatter(self, content: memoryview, layer: memoryview) -> None:
        """Copy the stream into a layer. (`content` has its size.)"""
        size, rows = self._row_index(len(layer))
        there = np.frombuffer(layer, np.uint8).reshape(-1, size)
        there[rows] = np.frombuffer(content, np.uint8).reshape(-1, size)

    def _row_index(self, layer_bytes: int) -> tuple[int, Numbers]:
        """The layer as rows of one size, and which of them these bytes are."""
        known = self._rows
        if known is None or known[0] != layer_bytes:
            self.check(layer_bytes)
            size = int(np.gcd.reduce(np.concatenate((self.starts, self.lengths, [layer_bytes]))))
            known = self._rows = layer_bytes, size, _spread(self.starts // size, self.lengths // size)
        return known[1], known[2]


class Copy(NamedTuple):
    """`times` runs of `length` bytes, at even distances on both sides."""

    times: int
    length: int
    source: int
    source_step: int
    target: int
    target_step: int

    def carry_out(self, source: Bytes, target: Bytes) -> None:
        """Copy now. (Within numpy, which lets other threads run meanwhile.)"""
        if self.times == 1:
            target[self.target : self.target + self.length] = source[self.source : self.source + self.length]
            return
        shape = self.times, self.length
        there = np.ndarray(shape, np.uint8, target, self.target, (self.target_step, 1))
        there[...] = np.ndarray(shape, np.uint8, source, self.source, (self.source_step, 1))


def copies(source: Places, target: Places) -> list[Copy] | None:
    """How a stream gets from its places in one layer to those in another; None if that takes many short copies."""
    ends = _merged(source.ends, target.ends)
    begins = np.concatenate(([0], ends[:-1]))
    columns = (ends - begins, source.locate(begins), target.locate(begins))
    ranges = list(zip(*(column.tolist() for column in columns), strict=True))
    found: list[Copy] = []
    most = max(source.nbytes // LONG_COPY_BYTES, FEW)
    index = 0
    while index < len(ranges):
        if len(found) == most:
            return None
        length, ours, theirs = ranges[index]
        count, steps = 1, (length, length)
        while index + count < len(ranges):
            longer, later_ours, later_theirs = ranges[index + count]
            _, last_ours, last_theirs = ranges[index + count - 1]
            step = later_ours - last_ours, later_theirs - last_theirs
            if longer != length or min(step) < length or (count > 1 and step != steps):
                break
            count, steps = count + 1, step
        found.append(Copy(count, length, ours, steps[0], theirs, steps[1]))
        index += count
    return found


def _spread(firsts: Numbers, counts: Numbers) -> Numbers:
    """firsts[0], firsts[0] + 1, ... (counts[0] of them), firsts[1], ..."""
    ends = np.cumsum(counts)
    return np.repeat(firsts - (ends - counts), counts) + np.arange(ends[-1])


def places_of(kv: SequenceKV, heads: range, tokens: range, other_block_size: int) -> Places:
    """Where a rank that holds `heads` has the KV of `tokens` (at least one), in the logical order of
    `policy.digest_units`: by run of tokens that lies in one block on both sides, then K before V, then head."""
    layout = kv.layout
    size = layout.block_size
    edges = [
        np.arange(tokens.start - tokens.start % step + step, tokens.stop, step) for step in (size, other_block_size)
    ]
    starts: Numbers = np.unique(np.concatenate(([tokens.start], *edges)))
    counts = np.diff(starts, append=tokens.stop)
    table: Numbers = np.asarray(kv.blocks, dtype=np.int64)
    runs = table[starts // size - kv.first_block] * layout.block_bytes + starts % size * layout.vector_bytes
    first = heads.start % layout.heads_per_rank
    pieces: Numbers = np.array(
        [layout.offset(plane, head) for plane in range(layout.planes) for head in range(first, first + len(heads))]
    )
    lengths = np.repeat(counts * layout.vector_bytes, len(pieces))
    return Places((runs[:, None] + pieces).reshape(-1), lengths)


def _merged(*edges: Numbers) -> Numbers:
    """All of them, ascending, each once. (np.unique takes longer.)"""
    together: Numbers = np.sort(np.concatenate(edges))
    fresh = np.ones(len(together), dtype=bool)
    np.not_equal(together[1:], together[:-1], out=fresh[1:])
    return together[fresh]
