"""Tickets: what was minted comes out; anything else is refused."""

from __future__ import annotations

import pytest
from diptych.core.errors import TicketError
from diptych.core.ticket import TicketClaims
from diptych.wire.tickets import mint, open_ticket
from hypothesis import given
from hypothesis import strategies as st

KEY = b"k" * 32
CLAIMS = TicketClaims(
    request_id="r1",
    worker_id="d0",
    epoch=3,
    blocks=(4, 9, 2),
    first_block=1,
    num_tokens=40,
    layout_digest="layout",
    model_digest="model",
    salt="tenant",
    nonce=b"n" * 16,
)


def test_a_ticket_gives_its_claims_back() -> None:
    assert open_ticket(mint(CLAIMS, KEY), KEY) == CLAIMS


@given(st.data())
def test_a_changed_ticket_is_refused(data: st.DataObject) -> None:
    ticket = bytearray(mint(CLAIMS, KEY))
    ticket[data.draw(st.integers(0, len(ticket) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TicketError):
        open_ticket(bytes(ticket), KEY)


@given(st.binary(max_size=120))
def test_a_forged_ticket_is_refused(ticket: bytes) -> None:
    with pytest.raises(TicketError):
        open_ticket(ticket, KEY)


def test_a_ticket_of_another_fleet_is_refused() -> None:
    with pytest.raises(TicketError):
        open_ticket(mint(CLAIMS, b"x" * 32), KEY)


@given(st.integers(0, len(mint(CLAIMS, KEY)) - 1))
def test_a_cut_ticket_is_refused(length: int) -> None:
    with pytest.raises(TicketError):
        open_ticket(mint(CLAIMS, KEY)[:length], KEY)
