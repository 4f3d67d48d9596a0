"""The target against a source that says anything it likes: revocation at every point, and hostile frames."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transfer_harness import EPOCH, LAYOUT, TOKEN, TRANSPORTS, ScriptedSource, World, claims_for, page_digests, world

from diptych.core.errors import HandshakeError
from diptych.core.events import HandoffComplete, HandoffFailed, WriterGone
from diptych.transfer import frames, places
from diptych.wire.codec import LENGTH

LAYERS = range(LAYOUT.num_layers)
BLOCKS = (5, 6, 2)
OTHER = replace(LAYOUT, head_dim=8)


def assert_still_works(made: World) -> None:
    claims = claims_for("good", (7, 8))
    made.receiver.expect(claims)
    with ScriptedSource(made) as source:
        assert isinstance(source.begin(claims), frames.Go)
        for layer in LAYERS:
            source.pages(claims, layer)
        source.close_handoff(claims)
        assert source.connection.receive() == frames.Accepted("good", claims.nonce)
    assert made.at_target.next() == HandoffComplete("good", TOKEN)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_ticket_that_nobody_has_begun_is_revoked_at_once(transport: str, tmp_path: Path) -> None:
    with world(transport, tmp_path) as made, ScriptedSource(made) as source:
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        made.receiver.revoke("r1")
        assert made.at_target.next() == WriterGone("r1")
        answer = source.begin(claims)
        assert (type(answer), answer.code) == (frames.Rejected, "ticket_refused")
        source.pages(claims, 0)
        source.close_handoff(claims)
        source.hang_up()
        assert_still_works(made)
        assert made.at_target.empty


@pytest.mark.fault(41)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layers_before", [0, 1, len(LAYERS)])
@pytest.mark.parametrize("ending", ["stopped", "hang up"])
def test_a_begun_ticket_is_in_quarantine_until_its_writer_is_gone(
    transport: str, layers_before: int, ending: str, tmp_path: Path
) -> None:
    with world(transport, tmp_path) as made, ScriptedSource(made) as source:
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        assert source.begin(claims) == frames.Go("r1", claims.nonce)
        for layer in range(layers_before):
            source.pages(claims, layer)
        source.begin(claims_for("unknown", BLOCKS))  # answered, so all of the above has been seen
        made.receiver.revoke("r1")
        assert source.connection.receive() == frames.Cancel("r1", claims.nonce)
        for layer in range(layers_before, len(LAYERS)):  # late pages, and a late end: counted, and nothing else
            source.pages(claims, layer)
        source.close_handoff(claims)
        assert isinstance(source.begin(claims), frames.Rejected)
        assert made.at_target.empty
        if ending == "stopped":
            source.stopped(claims)
            source.stopped(claims)
        else:
            source.hang_up()
        assert made.at_target.next() == WriterGone("r1")
        assert made.receiver.book.counts["late frame"] == len(LAYERS) - layers_before + 1
        assert_still_works(made)
        assert made.at_target.empty


@pytest.mark.fault(31)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_writer_that_is_lost_fails_the_handoff_and_then_is_gone(transport: str, tmp_path: Path) -> None:
    with world(transport, tmp_path) as made:
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        with ScriptedSource(made) as source:
            source.begin(claims)
            source.pages(claims, 0)
        failed = made.at_target.next()
        assert (type(failed), failed.request_id) == (HandoffFailed, "r1")
        with ScriptedSource(made) as source:
            assert isinstance(source.begin(claims), frames.Rejected)  # its ticket is used up
        made.receiver.revoke("r1")
        assert made.at_target.next() == WriterGone("r1")
        assert made.at_target.empty


def test_an_inline_write_that_ends_in_the_middle_fails_the_handoff(tmp_path: Path) -> None:
    with world("tcp", tmp_path) as made:
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        with ScriptedSource(made) as source:
            source.begin(claims)
            source.pages(claims, 0, payload=[memoryview(bytes(100))], nbytes=3 * LAYOUT.block_bytes)
        assert isinstance(made.at_target.next(), HandoffFailed)
        assert_still_works(made)


@pytest.mark.fault(40)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "change",
    [
        {"layer": len(LAYERS)},
        {"layer": -1},
        {"num_layers": 0},
        {"num_layers": -1},
        {"num_layers": len(LAYERS)},
        {"num_layers": len(LAYERS) + 1},
        {"num_layers": 2**62},
        {"first_group": 0},
        {"first_group": 2},
        {"first_group": -(2**62)},
        {"first_group": 2**62},
        {"digests": b""},
        {"digests": bytes(8 * 2)},
        {"digests": bytes(8 * 3)},
        {"digests": bytes(8 * 2 - 1)},
        {"digests": bytes(8 * 2 + 1)},
    ],
    ids=str,
)
def test_pages_that_do_not_belong_fail_the_handoff(transport: str, change: dict[str, object], tmp_path: Path) -> None:
    with world(transport, tmp_path) as made, ScriptedSource(made) as source:
        claims = claims_for("r1", BLOCKS, first_block=1)
        made.receiver.expect(claims)
        source.begin(claims)
        source.pages(claims, 0, **change)
        rejected = source.connection.receive()
        assert isinstance(rejected, frames.Rejected)
        failed = made.at_target.next()
        assert failed == HandoffFailed("r1", rejected.code, rejected.message)
        for layer in LAYERS:  # too late to make it good
            source.pages(claims, layer)
        source.close_handoff(claims)
        assert_still_works(made)
        assert made.at_target.empty
        assert made.block(made.target, 0, 0) == bytes(LAYOUT.block_bytes)


@pytest.mark.fault(39)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("wrong", [None, *LAYERS])
@pytest.mark.parametrize("few", [1, places.FEW], ids=["staged", "in place"])
def test_each_layer_of_a_frame_is_verified(
    transport: str, wrong: int | None, few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "FEW", few)
    with world(transport, tmp_path) as made, ScriptedSource(made) as source:
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        source.begin(claims)
        digests = [bytearray(page_digests(made.source, layer, BLOCKS)) for layer in LAYERS]
        if wrong is not None:
            digests[wrong][-1] ^= 1
        pages = [memoryview(made.block(made.source, layer, block)) for layer in LAYERS for block in BLOCKS]
        if source.mapped:
            for layer in LAYERS:
                made.target.layer(layer)[:] = made.source.layer(layer)
            pages = []
        source.pages(claims, 0, num_layers=len(LAYERS), digests=b"".join(digests), payload=pages)
        source.close_handoff(claims)
        if wrong is None:
            assert isinstance(made.at_target.next(), HandoffComplete)
        else:
            failed = made.at_target.next()
            assert isinstance(failed, HandoffFailed)
            assert failed.code == "kv_corrupt"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("nbytes", [-1, -(2**63), 2**63, 2**64 - 1])
def test_an_impossible_payload_ends_the_connection(transport: str, nbytes: int, tmp_path: Path) -> None:
    with world(transport, tmp_path) as made, ScriptedSource(made) as source:
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        source.begin(claims)
        source.pages(claims, 0, payload=(), nbytes=nbytes)
        with contextlib.suppress(ConnectionError):
            assert source.connection.receive() is None
        source.hang_up()
        assert isinstance(made.at_target.next(), HandoffFailed)
        assert_still_works(made)


@pytest.mark.fault(40)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("change", [{"nonce": b"x" * 16}, {"epoch": EPOCH - 1}, {"request_id": "other"}], ids=str)
def test_stray_frames_are_counted_and_change_nothing(transport: str, change: dict[str, object], tmp_path: Path) -> None:
    with world(transport, tmp_path) as made, ScriptedSource(made) as source:
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        source.begin(claims)
        source.pages(claims, 0, **change)
        source.close_handoff(claims, **change)
        for layer in LAYERS:
            source.pages(claims, layer)
        source.close_handoff(claims)
        assert source.connection.receive() == frames.Accepted("r1", claims.nonce)
        assert made.at_target.next() == HandoffComplete("r1", TOKEN)
        assert made.receiver.book.counts["stray frame"] == 2


@pytest.mark.fault(28)
def test_a_ticket_serves_one_connection_once(tmp_path: Path) -> None:
    with world("tcp", tmp_path) as made, ScriptedSource(made) as thief, ScriptedSource(made) as source:
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        stale = claims_for("r1", BLOCKS, epoch=EPOCH - 1)
        forged = claims_for("r1", BLOCKS)
        foreign = claims_for("r2", BLOCKS)
        for other in (stale, forged, foreign):
            assert isinstance(thief.begin(other), frames.Rejected)
        source.begin(claims)
        assert isinstance(thief.begin(claims), frames.Rejected)  # in use
        for layer in LAYERS:
            thief.pages(claims, layer)
        thief.close_handoff(claims)
        assert isinstance(thief.begin(claims), frames.Rejected)
        assert made.at_target.empty
        for layer in LAYERS:
            source.pages(claims, layer)
        source.close_handoff(claims)
        assert source.connection.receive() == frames.Accepted("r1", claims.nonce)
        assert isinstance(source.begin(claims), frames.Rejected)  # used up
        assert made.at_target.next() == HandoffComplete("r1", TOKEN)
        assert made.at_target.empty


@pytest.mark.fault(44)
@pytest.mark.parametrize("change", [{"layout": OTHER}, {"model": "another"}])
def test_a_source_that_serves_something_else_is_not_welcome(change: dict[str, object], tmp_path: Path) -> None:
    with world("shm", tmp_path) as made:
        with ScriptedSource(made, **change) as source:
            assert isinstance(source.welcome, frames.Refused)
        assert_still_works(made)


def test_the_wrong_key_is_counted(tmp_path: Path) -> None:
    with world("tcp", tmp_path) as made:
        with pytest.raises(HandshakeError):
            ScriptedSource(made, key=b"x" * 32)
        assert_still_works(made)
        assert made.receiver.book.counts["refused connection"] == 1


@pytest.mark.fault(61)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=120))
def test_bytes_from_strangers_and_garbage_from_sources_cost_only_their_connection(data: bytes, tmp_path: Path) -> None:
    with world("tcp", tmp_path) as made:
        _, host, port = made.endpoint.address.split(":")
        with socket.create_connection((host, int(port))) as stranger, contextlib.suppress(ConnectionError):
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1000)[:0] == b""
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        with ScriptedSource(made) as source, contextlib.suppress(ConnectionError):
            source.begin(claims)
            source.connection._socket.sendall(LENGTH.pack(len(data)) + b"\xc1" + data[1:])
            assert source.connection.receive() is None
        assert isinstance(made.at_target.next(), HandoffFailed)
        assert_still_works(made)
        assert made.at_target.empty


@pytest.mark.parametrize("length", [1 << 20 | 1, (1 << 32) - 1])
def test_a_frame_above_the_maximum_ends_the_connection(length: int, tmp_path: Path) -> None:
    with world("tcp", tmp_path) as made:
        with ScriptedSource(made) as source, contextlib.suppress(ConnectionError):
            source.connection._socket.sendall(LENGTH.pack(length))
            assert source.connection.receive() is None
        assert_still_works(made)
        assert made.receiver.book.counts["broken connection"] == 1
