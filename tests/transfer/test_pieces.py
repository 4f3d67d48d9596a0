"""Frames and pieces: the same bytes in the same order, in portions of the right size, whole unit by whole unit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_any_layout import Case, cases

from diptych.core.errors import TransferError
from diptych.policy.digest_units import byte_runs, digest_units
from diptych.policy.resharding import plan_resharding
from diptych.transfer import frames, pieces, places
from diptych.transfer.expected import Expected
from diptych.transfer.pieces import PairPieces, Piece, PlanPieces
from diptych.transfer.places import Places


def every_byte(places: Places) -> list[int]:
    runs = zip(places.starts.tolist(), places.lengths.tolist(), strict=True)
    return [start + step for start, length in runs for step in range(length)]


def cut(case: Case) -> list[PairPieces]:
    plan = plan_resharding(case.source, case.target, case.missing)
    return [pair for _, _, pair in PlanPieces(plan, case.source.layout, case.claims("r1")).of_layers([0])]


@given(cases(), st.integers(1, 3000), st.sampled_from((1, 16, 64, 1 << 14)), st.sampled_from((1, 8)))
def test_pieces_are_the_units_in_order(case: Case, piece_bytes: int, long_run: int, few: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        for name in ("LONG_RUN_BYTES", "LONG_COPY_BYTES"):
            patch.setattr(places, name, long_run)
        patch.setattr(places, "FEW", few)
        pairs = [[pair[index] for index in range(len(pair))] for pair in cut(case)]
    units = digest_units(case.source.layout, case.target.layout, case.missing)
    for pair in pairs:
        group = case.missing.start // max(case.source.layout.block_size, case.target.layout.block_size)
        for piece in pair:
            assert piece.first_group == group
            assert piece.source.nbytes <= piece_bytes or len(piece.unit_ends) == 1
            start = 0
            for index, end in enumerate(piece.unit_ends):
                unit = units.pop(0)
                for kv, side in ((case.source, piece.source), (case.target, piece.target)):
                    assert every_byte(side.part(start, end)) == in_order(byte_runs(kv, unit))
                if piece.spans is not None:
                    assert list(range(*piece.spans[index])) == in_order(byte_runs(case.source, unit))
                start, group = end, group + 1
            assert start == piece.source.nbytes == piece.target.nbytes
            check_copies(piece)
    assert not units


def in_order(runs: list[tuple[int, int]]) -> list[int]:
    return [byte for start, length in runs for byte in range(start, start + length)]


def check_copies(piece: Piece) -> None:
    """They move the same bytes, as seen in a memory where each byte says where it is."""
    ours, theirs = every_byte(piece.source), every_byte(piece.target)
    for copy in piece.copies or ():
        for index in range(copy.times):
            source, target = copy.source + index * copy.source_step, copy.target + index * copy.target_step
            assert list(range(source, source + copy.length)) == ours[: copy.length]
            assert list(range(target, target + copy.length)) == theirs[: copy.length]
            del ours[: copy.length], theirs[: copy.length]
    assert not ours or piece.copies is None


@given(cases(), st.data())
def test_the_target_finds_the_same_places(case: Case, data: st.DataObject) -> None:
    """It knows the source's layout, and neither its blocks nor how it cuts frames."""
    claims = case.claims("r1")
    expected = Expected(case.source.layout, claims)
    units = digest_units(case.source.layout, case.target.layout, case.missing)
    groups = len(units) // len({unit.pair for unit in units})
    pair = data.draw(st.integers(0, len(units) // groups - 1))
    start = data.draw(st.integers(0, groups - 1))
    stop = data.draw(st.integers(start + 1, groups))
    layer = data.draw(st.integers(0, claims.layout.num_layers - 1))
    stage = claims.layout.stage_of(layer)
    alike = [later for later in range(layer, claims.layout.num_layers) if claims.layout.stage_of(later) == stage]
    num_layers = data.draw(st.integers(1, len(alike)))
    if layer + len(alike) < claims.layout.num_layers:  # the next one is on another rank
        about = "r1", claims.nonce, claims.epoch, layer, len(alike) + 1, pair
        with pytest.raises(TransferError, match="in one frame"):
            expected.share(frames.Pages(*about, 0, bytes(8 * (len(alike) + 1)), 0))
    first = case.missing.start // max(case.source.layout.block_size, case.target.layout.block_size)
    about = "r1", claims.nonce, claims.epoch, layer, num_layers, pair
    frame = frames.Pages(*about, first + start, bytes(8 * (stop - start) * num_layers), 0)
    share = expected.share(frame)
    wanted = units[pair * groups + start : pair * groups + stop]
    runs = [byte_runs(case.target, unit) for unit in wanted]
    assert every_byte(share.places) == [byte for run in runs for at, size in run for byte in range(at, at + size)]
    lengths = [sum(length for _, length in run) for run in runs]
    assert share.unit_ends == [sum(lengths[: index + 1]) for index in range(len(lengths))]
    layout = claims.layout
    assert list(share.layers) == alike[:num_layers]
    assert set(share.layers) <= set(layout.layers_of(share.rank))
    assert set(wanted[0].pair.heads) <= set(layout.heads_of(share.rank))


@given(cases(), st.data())
def test_layers_that_come_together_share_frames_of_one_rank(case: Case, data: st.DataObject) -> None:
    """Each layer and pair once; never more than a frame's bytes, unless one layer has more."""
    target = case.target.layout
    layers = sorted(data.draw(st.sets(st.integers(0, target.num_layers - 1), min_size=1)))
    frame_bytes = data.draw(st.sampled_from((1, 4096, 1 << 14, 1 << 20)))
    plan = plan_resharding(case.source, case.target, case.missing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "FRAME_BYTES", frame_bytes)
        found = list(PlanPieces(plan, case.source.layout, case.claims("r1")).of_layers(layers))
    for _, transfers, cut in found:
        run = [transfer.layer for transfer in transfers]
        assert run == list(range(run[0], run[0] + len(run)))
        assert len({transfer.target_rank for transfer in transfers}) == 1
        assert len(run) == 1 or len(run) * cut.nbytes <= frame_bytes
    moved = [(pair, transfer) for pair, transfers, _ in found for transfer in transfers]
    wanted = [transfer for transfer in plan.layers if transfer.layer in layers]
    assert sorted(transfer.layer for _, transfer in moved) == [transfer.layer for transfer in wanted]
    assert {id(transfer) for _, transfer in moved} == {id(transfer) for transfer in wanted}
