"""Links of several connections: nothing depends on which one is faster, and they end together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from raw_source import RawSource, Sendable
from transfer_harness import KEY, LAYOUT, TOKEN, TRANSPORTS, Gate, World, claims_for, world

from diptych.core.events import (
    HandoffComplete,
    HandoffFailed,
    LinkLost,
    PushAccepted,
    PushRejected,
    PushStopped,
    WriterGone,
)
from diptych.core.kv_layout import SequenceKV
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import plan_resharding
from diptych.transfer import frames, peer, pieces
from diptych.transfer.writers import PageWriter
from diptych.wire.blocking import dial
from diptych.wire.codec import encode_frame

BLOCKS = (5, 6, 2, 9)
each_transport = pytest.mark.parametrize("transport", TRANSPORTS)
over_sockets = pytest.mark.parametrize("transport", ["tcp", "shm"])


@dataclass
class Pair:
    """Two connections of one link, and a hand-off that has begun."""

    made: World
    first: RawSource
    second: RawSource
    claims: TicketClaims
    sendables: list[Sendable]


@contextlib.contextmanager
def two_connections(transport: str, directory: Path) -> Iterator[Pair]:
    with world(transport, directory) as made, RawSource(made) as first, first.join() as second:
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        assert first.begin(claims) == frames.Go("r1", claims.nonce)
        source = SequenceKV(LAYOUT, (1, 2, 3, 4))
        plan = plan_resharding(source, SequenceKV(LAYOUT, BLOCKS), range(claims.num_tokens))
        yield Pair(made, first, second, claims, first.frames_of(claims, plan))


def answered(source: RawSource) -> None:
    """Everything that was sent on this connection has been seen."""
    source.connection.send(frames.Begin("nobody", b"", 0))


@each_transport
def test_a_close_waits_for_pages_on_other_connections(transport: str, tmp_path: Path) -> None:
    with two_connections(transport, tmp_path) as pair:
        early, *late = pair.sendables
        pair.second.send(early)
        total = {pair.claims.nonce: len(pair.sendables)}
        pair.first.sent |= total
        pair.first.close_handoff(pair.claims)
        assert isinstance(pair.first.begin(claims_for("r2", BLOCKS)), frames.Rejected)  # so the close has been seen
        assert pair.made.at_target.empty
        for sendable in late:
            pair.second.send(sendable)
        assert pair.first.connection.receive(20) == frames.Accepted("r1", pair.claims.nonce)
        assert pair.made.at_target.next() == HandoffComplete("r1", TOKEN)
        assert pair.made.receiver.book.counts == {"unknown ticket": 1}


@each_transport
def test_a_close_that_announces_too_few_frames_fails(transport: str, tmp_path: Path) -> None:
    with two_connections(transport, tmp_path) as pair:
        pair.first.close_handoff(pair.claims)
        assert isinstance(pair.first.connection.receive(20), frames.Rejected)
        assert isinstance(pair.made.at_target.next(), HandoffFailed)


@pytest.mark.parametrize("revoked", [True, False])
def test_a_source_has_not_stopped_while_a_page_is_coming_in(revoked: bool, tmp_path: Path) -> None:
    """Otherwise its bytes would be received into blocks that are somebody else's by then."""
    with two_connections("tcp", tmp_path) as pair:
        frame, content = pair.sendables[0].frame, pair.sendables[0].content
        pair.second.send_raw(encode_frame(frame) + content[:-1])
        book = pair.made.receiver.book
        wait_until_busy(pair)
        if revoked:
            pair.made.receiver.revoke("r1")
            assert isinstance(pair.first.connection.receive(20), frames.Cancel)
        pair.first.stopped(pair.claims)
        assert isinstance(pair.first.begin(claims_for("r2", BLOCKS)), frames.Rejected)  # so that has been seen
        assert pair.made.at_target.empty
        pair.second.send_raw(content[-1:])
        if revoked:
            assert pair.made.at_target.next() == WriterGone("r1")
        else:
            assert pair.made.at_target.next().code == "handoff_abandoned"
        assert not book.counts["corrupt pages"]


def wait_until_busy(pair: Pair) -> None:
    """Until the thread of the second connection is at the frame."""
    ticket = pair.made.receiver.book._tickets["r1"]
    while not ticket.busy:
        assert isinstance(pair.first.begin(claims_for("r2", BLOCKS)), frames.Rejected)
    pair.made.receiver.book.counts.clear()


@each_transport
@pytest.mark.parametrize("lost", ["first", "second"])
def test_the_loss_of_one_connection_is_that_of_the_link(transport: str, lost: str, tmp_path: Path) -> None:
    with two_connections(transport, tmp_path) as pair:
        gone, other = (pair.first, pair.second) if lost == "first" else (pair.second, pair.first)
        pair.first.send(pair.sendables[0])
        gone.hang_up()
        with contextlib.suppress(ConnectionError):
            assert other.connection.receive(20) is None
        if transport != "tcp" and transport != "tls":  # it might still write to mapped memory
            assert pair.made.at_target.empty
        other.hang_up()
        assert pair.made.at_target.next().code == "transfer_failed"
        pair.made.receiver.revoke("r1")
        assert pair.made.at_target.next() == WriterGone("r1")


@over_sockets
def test_nobody_joins_a_link_that_is_not_there(transport: str, tmp_path: Path) -> None:
    with two_connections(transport, tmp_path) as pair:
        for link in (b"", b"x" * 16, pair.first.welcome.link[:-1]):
            connection = dial(pair.made.endpoint.address, KEY, frames.FromTarget)
            with contextlib.closing(connection), contextlib.suppress(ConnectionError):
                connection.send(frames.Join(link))
                assert connection.receive(20) is None
        link = pair.first.welcome.link
        pair.first.hang_up()
        pair.second.hang_up()
        assert isinstance(pair.made.at_target.next(), HandoffFailed)
        connection = dial(pair.made.endpoint.address, KEY, frames.FromTarget)
        with contextlib.closing(connection), contextlib.suppress(ConnectionError):
            connection.send(frames.Join(link))
            assert connection.receive(20) is None


@over_sockets
def test_the_connections_of_a_link_are_limited(transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "MAX_STREAMS", 2)
    with two_connections(transport, tmp_path) as pair:
        with pair.first.join() as third:
            assert not third.joined
        for sendable in pair.sendables:  # the others do not mind
            pair.second.send(sendable)
        pair.first.close_handoff(pair.claims)
        assert pair.first.connection.receive(20) == frames.Accepted("r1", pair.claims.nonce)


@each_transport
@pytest.mark.parametrize("num_streams", [1, 2, 5])
def test_a_link_of_any_number_of_connections(
    transport: str, num_streams: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIECE_BYTES", "FRAME_BYTES"):
        monkeypatch.setattr(pieces, name, LAYOUT.block_bytes)
    with world(transport, tmp_path) as made:
        link = made.link(num_streams=num_streams)
        for name in ("r1", "r2", "r3"):
            claims = claims_for(name, BLOCKS)
            made.receiver.expect(claims)
            made.push_all(link, claims, [7, 1, 8, 3])
            assert made.at_target.next() == HandoffComplete(name, TOKEN)
            assert made.at_source.next() == PushAccepted(name)
            for layer in range(LAYOUT.num_layers):
                assert made.block(made.target, layer, 6) == made.block(made.source, layer, 1)


@each_transport
def test_a_link_whose_second_connection_is_cut_is_lost(transport: str, tmp_path: Path) -> None:
    with world(transport, tmp_path) as made:
        link = made.link()
        done, claims = claims_for("done", BLOCKS), claims_for("r1", BLOCKS)
        for each in (done, claims):
            made.receiver.expect(each)
        made.push_all(link, done, [7, 1, 8, 3])
        assert made.at_source.next() == PushAccepted("done")
        link.begin("r1", claims)
        while len([stream for stream in link._streams if stream.connection is not None]) < 2:
            made.push_all(link, claims_for("unknown", BLOCKS), [7, 1, 8, 3])
            made.at_source.next()
        link._streams[1].connection.end()
        events = [made.at_source.next()]
        while not isinstance(events[-1], LinkLost):
            events.append(made.at_source.next())
        assert "r1" in events[-1].request_ids
        link.abandon("r1", claims)
        events.append(made.at_source.next())
        assert PushStopped("r1") in events


@each_transport
def test_a_push_has_not_stopped_while_another_thread_writes_for_it(transport: str, tmp_path: Path) -> None:
    gates: list[Gate] = []

    def wrap(writer: PageWriter) -> PageWriter:
        gates.append(Gate(writer))
        return gates[0]

    with world(transport, tmp_path) as made:
        link = made.link(wrap)
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        plan = plan_resharding(
            SequenceKV(LAYOUT, BLOCKS), SequenceKV(LAYOUT, BLOCKS), range(len(BLOCKS) * LAYOUT.block_size)
        )
        link.push("r1", claims, plan, [0])
        made.push_all(link, claims_for("unknown", BLOCKS), BLOCKS)
        assert isinstance(made.at_source.next(), PushRejected)  # so both connections are there, and the link works
        assert gates[0].begun.wait(20)
        try:
            link.abandon("r1", claims)
            made.push_all(link, claims_for("unknown 2", BLOCKS), BLOCKS)
            assert isinstance(made.at_source.next(), PushRejected)  # so whatever was queued before is done
            assert made.at_source.empty
            assert made.at_target.empty
        finally:
            gates[0].may_go_on.set()
        assert made.at_source.next() == PushStopped("r1")
        assert made.at_target.next().code == "handoff_abandoned"
