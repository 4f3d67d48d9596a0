"""Frames and pieces: the same bytes in the same order, in portions of the right size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.kv_layout import ByteRange
from diptych.transfer import pieces
from diptych.transfer.pieces import Ranges, cut, frames_of

SIZE = 16

some_ranges = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 20))).map(
    lambda spans: tuple(ByteRange(*(blocks * SIZE for blocks in span)) for span in spans)
)


def every_byte(*parts: Ranges) -> list[tuple[int, int]]:
    spans = [span for part in parts for span in part]
    return [(span.source_offset + n, span.target_offset + n) for span in spans for n in range(span.length)]


@given(some_ranges, st.integers(1, 100))
def test_cut_ranges_are_the_same_ranges(ranges: Ranges, nbytes: int) -> None:
    parts = list(cut(ranges, SIZE, nbytes))
    assert every_byte(*parts) == every_byte(ranges)
    sizes = [sum(span.length for span in part) for part in parts]
    assert all(size == max(nbytes // SIZE, 1) * SIZE for size in sizes[:-1])
    assert all(0 < size <= max(nbytes, SIZE) for size in sizes)


@given(some_ranges, st.integers(1, 200), st.integers(1, 100))
def test_frames_consist_of_pieces(ranges: Ranges, frame_bytes: int, piece_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "FRAME_BYTES", frame_bytes)
        patch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        frames = frames_of(ranges, SIZE)
    assert every_byte(*(piece.ranges for frame in frames for piece in frame)) == every_byte(ranges)
    for frame in frames:
        assert 0 < sum(len(piece.blocks) for piece in frame) * SIZE <= max(frame_bytes, SIZE)
        for piece in frame:
            assert [source for source, _ in every_byte(piece.ranges)] == [
                byte for block in piece.blocks for byte in range(block * SIZE, (block + 1) * SIZE)
            ]
