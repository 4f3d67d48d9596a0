"""Tickets: what was minted comes out; anything else is refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.errors import TicketError
from diptych.core.kv_layout import KVLayout
from diptych.core.ticket import TicketClaims
from diptych.wire.tickets import MAC_BYTES, mint, open_ticket

KEY = b"k" * 32
claims_of_any_kind = st.builds(
    TicketClaims,
    request_id=st.text(st.characters(exclude_categories=["Cs"])),
    worker_id=st.just("d0"),
    epoch=st.integers(0, 2**63),
    blocks=st.lists(st.integers(0, 2**31)).map(tuple),
    first_block=st.integers(0, 100),
    num_tokens=st.integers(0, 10**6),
    layout=st.builds(
        KVLayout, num_layers=st.integers(1, 99), latent_dim=st.just(8), dtype=st.just("uint8"), block_size=st.just(4)
    ),
    model_digest=st.just("model"),
    salt=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    nonce=st.binary(min_size=16, max_size=16),
)


@given(claims=claims_of_any_kind)
def test_round_trip(claims: TicketClaims) -> None:
    assert open_ticket(mint(claims, KEY), KEY) == claims


@pytest.mark.fault(28)
@given(claims=claims_of_any_kind, place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_every_byte_counts(claims: TicketClaims, place: float, change: int) -> None:
    ticket = bytearray(mint(claims, KEY))
    ticket[int(place * len(ticket))] ^= change
    with pytest.raises(TicketError, match="not minted by this fleet"):
        open_ticket(bytes(ticket), KEY)


@given(claims=claims_of_any_kind, place=st.floats(0, 1, exclude_max=True), tail=st.binary(min_size=1, max_size=3))
def test_neither_shorter_nor_longer(claims: TicketClaims, place: float, tail: bytes) -> None:
    ticket = mint(claims, KEY)
    for other in (ticket[: int(place * len(ticket))], ticket + tail):
        with pytest.raises(TicketError):
            open_ticket(other, KEY)


@pytest.mark.fault(28)
@given(claims=claims_of_any_kind)
def test_another_fleets_ticket(claims: TicketClaims) -> None:
    with pytest.raises(TicketError, match="not minted by this fleet"):
        open_ticket(mint(claims, b"x" * 32), KEY)


@pytest.mark.fault(28)
@given(ticket=st.binary(max_size=2 * MAC_BYTES))
def test_random_bytes(ticket: bytes) -> None:
    with pytest.raises(TicketError):
        open_ticket(ticket, KEY)


def test_right_key_wrong_claims() -> None:
    """A fleet of another version: the MAC is right, the claims are not ours."""
    foreign = msgspec.defstruct("Foreign", [("request_id", str)])
    with pytest.raises(TicketError, match="does not parse"):
        open_ticket(mint(foreign("r1"), KEY), KEY)
