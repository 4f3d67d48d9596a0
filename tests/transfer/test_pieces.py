"""Frames and pieces: the same bytes in the same order, in portions of the right size, whole unit by whole unit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_any_layout import Case, cases

from diptych.policy.digest_units import byte_runs, digest_units
from diptych.policy.resharding import plan_resharding
from diptych.transfer import pieces
from diptych.transfer.expected import Expected
from diptych.transfer.pieces import PairFrames, PlanFrames
from diptych.transfer.places import Places


def every_byte(places: Places) -> list[int]:
    runs = zip(places.starts.tolist(), places.lengths.tolist(), strict=True)
    return [start + step for start, length in runs for step in range(length)]


def cut(case: Case) -> list[PairFrames]:
    plan = plan_resharding(case.source, case.target, case.missing)
    return [frames for _, _, frames in PlanFrames(plan, case.source.layout, case.claims("r1")).of_layer(0)]


@given(cases(), st.integers(1, 3000), st.integers(1, 1000))
def test_frames_and_pieces_are_the_units_in_order(case: Case, frame_bytes: int, piece_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "FRAME_BYTES", frame_bytes)
        patch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        pairs = [[frames[index] for index in range(len(frames))] for frames in cut(case)]
    units = digest_units(case.source.layout, case.target.layout, case.missing)
    for frames in pairs:
        group = case.missing.start // max(case.source.layout.block_size, case.target.layout.block_size)
        for frame in frames:
            assert frame.first_group == group
            assert frame.nbytes <= frame_bytes or sum(len(piece.unit_ends) for piece in frame.pieces) == 1
            for piece in frame.pieces:
                start = 0
                for end in piece.unit_ends:
                    unit = units.pop(0)
                    for kv, places in ((case.source, piece.source), (case.target, piece.target)):
                        runs = [range(offset, offset + length) for offset, length in byte_runs(kv, unit)]
                        assert every_byte(places.part(start, end)) == [byte for run in runs for byte in run]
                    start, group = end, group + 1
                assert start == piece.source.nbytes == piece.target.nbytes
                assert start <= piece_bytes or len(piece.unit_ends) == 1
    assert not units


@given(cases(), st.data())
def test_the_target_finds_the_same_places(case: Case, data: st.DataObject) -> None:
    """It knows the source's layout, and neither its blocks nor how it cuts frames."""
    from diptych.transfer import frames

    claims = case.claims("r1")
    expected = Expected(case.source.layout, claims)
    units = digest_units(case.source.layout, case.target.layout, case.missing)
    groups = len(units) // len({unit.pair for unit in units})
    pair = data.draw(st.integers(0, len(units) // groups - 1))
    start = data.draw(st.integers(0, groups - 1))
    stop = data.draw(st.integers(start + 1, groups))
    layer = data.draw(st.integers(0, claims.layout.num_layers - 1))
    first = case.missing.start // max(case.source.layout.block_size, case.target.layout.block_size)
    frame = frames.Pages("r1", claims.nonce, claims.epoch, layer, pair, first + start, bytes(8 * (stop - start)), 0)
    share = expected.share(frame)
    wanted = units[pair * groups + start : pair * groups + stop]
    runs = [byte_runs(case.target, unit) for unit in wanted]
    assert every_byte(share.places) == [byte for run in runs for at, size in run for byte in range(at, at + size)]
    lengths = [sum(length for _, length in run) for run in runs]
    assert share.unit_ends == [sum(lengths[: index + 1]) for index in range(len(lengths))]
    layout = claims.layout
    assert layer in layout.layers_of(share.rank)
    assert set(wanted[0].pair.heads) <= set(layout.heads_of(share.rank))
