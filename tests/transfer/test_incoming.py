"""The book of tickets, where what two threads do may come in any order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transfer_harness import EPOCH, LAYOUT, claims_for

from diptych.core.errors import TicketError, TransferError
from diptych.transfer import frames
from diptych.transfer.digest import DIGEST_BYTES
from diptych.transfer.incoming import Incoming, TicketBook

LAYERS = LAYOUT.num_layers
WRITER, OTHER = object(), object()
CLAIMS = claims_for("r1", (4, 9, 2, 7), first_block=1)


def pages(layer: int, first: int, count: int) -> frames.Pages:
    return frames.Pages("r1", CLAIMS.nonce, EPOCH, layer, first, bytes(DIGEST_BYTES * count), 0)


def begun() -> tuple[TicketBook, Incoming]:
    book = TicketBook(EPOCH, LAYERS)
    book.expect(CLAIMS)
    book.begin("r1", CLAIMS.nonce, EPOCH, WRITER)
    ticket = book.find("r1", CLAIMS.nonce, EPOCH, WRITER)
    assert ticket is not None
    return book, ticket


def test_where_pages_belong() -> None:
    _, ticket = begun()
    assert ticket.target_blocks(pages(0, 1, 3)) == (9, 2, 7)
    assert ticket.target_blocks(pages(LAYERS - 1, 3, 1)) == (7,)
    for layer, first, count in [(LAYERS, 1, 1), (-1, 1, 1), (0, 0, 1), (0, 1, 0), (0, 3, 2), (0, -1, 2), (0, 9, 1)]:
        with pytest.raises(TransferError, match="not asked for"):
            ticket.target_blocks(pages(layer, first, count))


@given(data=st.data())
def test_complete_means_every_page_of_every_layer(data: st.DataObject) -> None:
    book, ticket = begun()
    everything = [(layer, block) for layer in range(LAYERS) for block in (1, 2, 3)]
    arrived = data.draw(st.permutations(everything))[: data.draw(st.integers(0, len(everything)))]
    for layer, block in arrived:
        assert not ticket.complete
        book.mark(ticket, pages(layer, block, 1))
    if len(arrived) == len(everything):
        assert book.close(ticket)
        assert book.find("r1", CLAIMS.nonce, EPOCH, WRITER) is None  # used up
    else:
        with pytest.raises(TransferError, match="before all pages"):
            book.close(ticket)
    assert book.counts["duplicate pages"] == 0
    for layer, block in arrived:
        book.mark(ticket, pages(layer, block, 1))
    assert book.counts["duplicate pages"] == len(arrived)


@pytest.mark.parametrize("gone", ["stopped", "lost"])
def test_one_of_revoker_and_writer_reports_the_end(gone: str) -> None:
    """Whichever comes second; also if the first has not yet acted on what it was told."""

    def writer_goes(book: TicketBook) -> list[Incoming]:
        if gone == "lost":
            return book.writer_lost(WRITER)
        ticket = book.stopped("r1", CLAIMS.nonce, WRITER)
        return [] if ticket is None else [ticket]

    book, ticket = begun()
    assert book.revoke("r1") == (ticket, WRITER)
    assert not ticket.released
    assert writer_goes(book) == [ticket]
    assert ticket.released  # so the writer's thread reports it
    assert writer_goes(book) == []

    book, ticket = begun()
    assert writer_goes(book) == [ticket]
    assert book.revoke("r1") == (ticket, None)  # so the revoker reports it,
    assert not ticket.released  # and the writer's thread neither this
    assert not book.fail(ticket)  # nor a failure
    assert book.revoke("r1") == (None, None)


def test_only_its_own_writer_stops_a_ticket() -> None:
    book, ticket = begun()
    book.revoke("r1")
    assert book.stopped("r1", CLAIMS.nonce, OTHER) is None
    assert book.stopped("r1", b"another nonce", WRITER) is None
    assert book.stopped("r2", CLAIMS.nonce, WRITER) is None
    assert book.writer_lost(OTHER) == []
    assert book.find("r1", CLAIMS.nonce, EPOCH, WRITER) is None
    assert book.stopped("r1", CLAIMS.nonce, WRITER) is ticket


def test_a_ticket_is_begun_once() -> None:
    book, _ = begun()
    for writer in (WRITER, OTHER):
        with pytest.raises(TicketError, match="has been used"):
            book.begin("r1", CLAIMS.nonce, EPOCH, writer)
    book.stopped("r1", CLAIMS.nonce, WRITER)
    with pytest.raises(TicketError, match="has been used"):
        book.begin("r1", CLAIMS.nonce, EPOCH, OTHER)
    for request_id, nonce, epoch in [
        ("r2", CLAIMS.nonce, EPOCH),
        ("r1", b"another", EPOCH),
        ("r1", CLAIMS.nonce, EPOCH + 1),
    ]:
        with pytest.raises(TicketError, match="not known here"):
            book.begin(request_id, nonce, epoch, OTHER)
    assert book.counts == {"used ticket": 3, "unknown ticket": 3}


def test_a_failure_is_reported_once_and_not_after_a_revocation() -> None:
    book, ticket = begun()
    assert book.fail(ticket)
    assert not book.fail(ticket)
    assert not book.close(ticket)
    assert book.find("r1", CLAIMS.nonce, EPOCH, WRITER) is None  # what comes now is not looked at
    assert book.counts == {"failed hand-off": 1, "late frame": 1}
    book, ticket = begun()
    book.revoke("r1")
    assert not book.fail(ticket)
    assert not book.close(ticket)
    assert book.counts["failed hand-off"] == 0
