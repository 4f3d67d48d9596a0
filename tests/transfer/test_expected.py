"""Which units a writer has to send, when the two sides are cut differently."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
from transfer_harness import EPOCH, claims_for

from diptych.core.errors import TransferError
from diptych.core.kv_layout import KVLayout
from diptych.transfer import expected, frames
from diptych.transfer.digest import DIGEST_BYTES
from diptych.transfer.expected import Expected

TARGET = KVLayout(num_layers=3, num_kv_heads=4, head_dim=2, dtype="float32", block_size=4)
SOURCE = replace(TARGET, tensor_parallel=2)
CLAIMS = replace(claims_for("r1", (4, 9, 2, 7), first_block=1), layout=TARGET, num_tokens=14)
EVERYTHING = list(product(range(3), range(2), range(1, 4)))  # layer, pair of ranks, group of tokens


def pages(layer: int, pair: int, first: int, digests: bytes = bytes(DIGEST_BYTES)) -> frames.Pages:
    return frames.Pages("r1", CLAIMS.nonce, EPOCH, layer, 1, pair, first, digests, 0)


@pytest.mark.parametrize("seed", range(5))
def test_every_unit_of_every_pair_counts_once(seed: int) -> None:
    units = Expected(SOURCE, CLAIMS)
    order = random.Random(seed).sample(EVERYTHING, len(EVERYTHING))
    for number, unit in enumerate(order):
        assert units.num_missing == len(EVERYTHING) - number
        assert units.mark(pages(*unit))
        assert not units.mark(pages(*unit))
    assert units.num_missing == 0


def test_with_everything_present_nothing_is_missing() -> None:
    units = Expected(SOURCE, replace(CLAIMS, first_block=4))
    assert units.num_missing == 0
    with pytest.raises(TransferError, match="not asked for"):
        units.share(pages(0, 0, 4))


def test_half_a_digest_is_refused() -> None:
    with pytest.raises(TransferError, match="no whole number of digests"):
        Expected(SOURCE, CLAIMS).share(pages(0, 0, 1, bytes(DIGEST_BYTES + 1)))


def test_what_is_remembered_about_frames_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected, "MAX_KNOWN_UNITS", 4)
    units = Expected(SOURCE, CLAIMS)
    shares = {unit: units.share(pages(*unit)) for unit in EVERYTHING}
    assert sum(len(ends) for _, ends, _ in units._parts.values()) == 4  # of six, the same in all layers
    assert all(units.share(pages(*unit)).unit_ends == share.unit_ends for unit, share in shares.items())
