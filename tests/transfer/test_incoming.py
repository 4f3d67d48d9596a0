"""The book of tickets, where what several threads do may come in any order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transfer_harness import EPOCH, LAYOUT, TOKEN, claims_for

from diptych.core.errors import TicketError, TransferError
from diptych.transfer import frames
from diptych.transfer.digest import DIGEST_BYTES
from diptych.transfer.incoming import Ending, Incoming, TicketBook

LAYERS = LAYOUT.num_layers
WRITER, OTHER = object(), object()
CLAIMS = claims_for("r1", (4, 9, 2, 7), first_block=1)
STOPPED = frames.Stopped("r1", CLAIMS.nonce)


def begin(request_id: str = "r1", nonce: bytes = CLAIMS.nonce, epoch: int = EPOCH) -> frames.Begin:
    return frames.Begin(request_id, nonce, epoch)


def pages(layer: int = 0, first: int = 1, count: int = 1, pair: int = 0) -> frames.Pages:
    return frames.Pages("r1", CLAIMS.nonce, EPOCH, layer, 1, pair, first, bytes(DIGEST_BYTES * count), 0)


def closing(num_frames: int) -> frames.Close:
    return frames.Close("r1", CLAIMS.nonce, EPOCH, num_frames, TOKEN, b"")


def begun() -> tuple[TicketBook, Incoming]:
    book = TicketBook(EPOCH)
    book.expect(CLAIMS)
    book.begin(begin(), WRITER, LAYOUT)
    ticket = book.enter(pages(), WRITER)
    assert ticket is not None
    book.leave(ticket)
    ticket.done = 0
    return book, ticket


def arrive(book: TicketBook, frame: frames.Pages) -> Ending | None:
    """A frame, verified."""
    ticket = book.enter(frame, WRITER)
    assert ticket is not None
    book.mark(ticket, frame)
    return book.leave(ticket)


def test_where_pages_belong() -> None:
    _, ticket = begun()
    expected, size = ticket.expected, LAYOUT.block_bytes
    assert expected is not None
    for frame, blocks in ((pages(0, 1, 3), [9, 2, 7]), (pages(LAYERS - 1, 3, 1), [7])):
        share = expected.share(frame)
        assert share.places.starts.tolist() == [block * size for block in blocks]
        assert share.unit_ends == [size * (index + 1) for index in range(len(blocks))]
    wrong = [(LAYERS, 1, 1, 0), (-1, 1, 1, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 3, 2, 0), (0, -1, 2, 0), (0, 9, 1, 0)]
    for fields in [*wrong, (0, 1, 1, 1), (0, 1, 1, -1)]:
        with pytest.raises(TransferError, match="not asked for"):
            expected.share(pages(*fields))
    uneven = frames.Pages("r1", CLAIMS.nonce, EPOCH, 0, 2, 0, 1, bytes(DIGEST_BYTES * 3), 0)
    with pytest.raises(TransferError, match="for each layer"):
        expected.share(uneven)


def test_what_is_remembered_of_frames_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.transfer.expected.MAX_KNOWN_UNITS", 4)
    _, ticket = begun()
    assert ticket.expected is not None
    for first, count in ((1, 1), (1, 2), (1, 3), (2, 2), (3, 1), (2, 1)):
        for _ in range(2):
            share = ticket.expected.share(pages(0, first, count))
            assert len(share.unit_ends) == count
    assert sum(len(ends) for _, ends, _ in ticket.expected._parts.values()) == 4


@given(data=st.data())
def test_complete_means_every_unit_of_every_layer(data: st.DataObject) -> None:
    book, ticket = begun()
    everything = [(layer, group) for layer in range(LAYERS) for group in (1, 2, 3)]
    arrived = data.draw(st.permutations(everything))[: data.draw(st.integers(0, len(everything)))]
    closed_after = data.draw(st.integers(0, len(arrived)))
    ending = None
    for index, (layer, group) in enumerate(arrived):
        assert ending is None
        if index == closed_after:
            assert book.close(closing(len(arrived)), WRITER) == (ticket, None)
        ending = arrive(book, pages(layer, group))
    if closed_after == len(arrived):
        ending = book.close(closing(len(arrived)), WRITER)[1]
    assert book.counts["duplicate pages"] == 0
    if len(arrived) == len(everything):
        assert ending is Ending.COMPLETE
        assert book.enter(pages(), WRITER) is ticket
        assert not ticket.wanted  # what comes now must not be written
        assert book.leave(ticket) is None
        assert book.reported(ticket) is None
        assert book.enter(pages(), WRITER) is None  # used up
    else:
        assert ending is Ending.INCOMPLETE
        assert book.reported(ticket) is not Ending.COMPLETE
        for layer, group in arrived:
            arrive(book, pages(layer, group))
        assert book.counts["duplicate pages"] == len(arrived)


def test_nothing_ends_before_it_is_reported_what_came_of_it() -> None:
    """Or a report about one ticket could be taken for one about the next of the same request."""
    for whole in (True, False):
        book, ticket = begun()
        arrived = [(layer, group) for layer in range(LAYERS) for group in (1, 2, 3)][not whole :]
        for layer, group in arrived:
            arrive(book, pages(layer, group))
        assert book.close(closing(len(arrived)), WRITER)[1] is (Ending.COMPLETE if whole else Ending.INCOMPLETE)
        assert book.revoke("r1") == (ticket, WRITER)
        assert book.stop(STOPPED, WRITER) == (ticket, None)
        assert not ticket.released
        assert book.reported(ticket) is Ending.STOPPED
        assert ticket.released
        assert book.revoke("r1") == (None, None)


def test_nothing_ends_while_a_thread_is_at_work() -> None:
    for revoked in (False, True):
        book, ticket = begun()
        assert book.enter(pages(), WRITER) is ticket
        if revoked:
            assert book.revoke("r1") == (ticket, WRITER)
        assert book.stop(STOPPED, WRITER) == (ticket, None)
        assert not ticket.released
        assert book.leave(ticket) is Ending.STOPPED
        assert ticket.released is revoked
        assert book.stop(STOPPED, WRITER) == (None, None)


@pytest.mark.parametrize("gone", ["stopped", "lost"])
def test_one_of_revoker_and_writer_reports_the_end(gone: str) -> None:
    """Whichever comes second; also if the first has not yet acted on what it was told."""

    def writer_goes(book: TicketBook) -> list[Incoming]:
        if gone == "lost":
            return book.writer_lost(WRITER)
        ticket, ending = book.stop(STOPPED, WRITER)
        return [] if ticket is None or ending is not Ending.STOPPED else [ticket]

    book, ticket = begun()
    assert book.revoke("r1") == (ticket, WRITER)
    assert not ticket.released
    assert writer_goes(book) == [ticket]
    assert ticket.released  # so the writer's thread reports it
    assert writer_goes(book) == []
    assert book.revoke("r1") == (None, None)  # nothing is left of it
    with pytest.raises(TicketError, match="not known here"):
        book.begin(begin(), OTHER, LAYOUT)

    book, ticket = begun()
    assert writer_goes(book) == [ticket]
    assert book.revoke("r1") == (ticket, None)  # so the revoker reports it,
    assert not ticket.released  # and the writer's thread neither this
    assert not book.fail(ticket)  # nor a failure
    assert book.revoke("r1") == (None, None)


def test_only_its_own_writer_stops_a_ticket() -> None:
    book, ticket = begun()
    book.revoke("r1")
    assert book.stop(STOPPED, OTHER) == (None, None)
    assert book.stop(frames.Stopped("r1", b"another nonce"), WRITER) == (None, None)
    assert book.stop(frames.Stopped("r2", CLAIMS.nonce), WRITER) == (None, None)
    assert book.writer_lost(OTHER) == []
    assert book.stop(STOPPED, WRITER) == (ticket, Ending.STOPPED)


def test_a_ticket_is_begun_once() -> None:
    book, _ = begun()
    for writer in (WRITER, OTHER):
        with pytest.raises(TicketError, match="has been used"):
            book.begin(begin(), writer, LAYOUT)
    book.stop(STOPPED, WRITER)
    with pytest.raises(TicketError, match="has been used"):
        book.begin(begin(), OTHER, LAYOUT)
    for wrong in (begin("r2"), begin(nonce=b"another"), begin(epoch=EPOCH + 1)):
        with pytest.raises(TicketError, match="not known here"):
            book.begin(wrong, OTHER, LAYOUT)
    assert book.counts == {"used ticket": 3, "unknown ticket": 3}


def test_a_failure_is_reported_once_and_not_after_a_revocation() -> None:
    book, ticket = begun()
    assert book.fail(ticket)
    assert not book.fail(ticket)
    assert book.close(closing(0), WRITER) == (None, None)
    assert arrive(book, pages()) is None  # what comes now is not looked at
    assert book.counts == {"failed hand-off": 1, "late frame": 2}
    book, ticket = begun()
    book.revoke("r1")
    assert not book.fail(ticket)
    assert book.close(closing(0), WRITER) == (None, None)
    assert book.counts["failed hand-off"] == 0
