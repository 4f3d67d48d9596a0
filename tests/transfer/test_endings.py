"""How hand-offs end when they do not succeed, and how receivers and their connections end."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest
from transfer_harness import (
    EPOCH,
    KEY,
    LAYOUT,
    RESHARDED,
    SOCKET_TRANSPORTS,
    TOKEN,
    TRANSPORTS,
    ScriptedSource,
    World,
    claims_for,
    world,
)

from diptych.core.events import (
    HandoffComplete,
    HandoffFailed,
    LinkLost,
    PushAccepted,
    PushCancelled,
    PushRejected,
    PushStopped,
    WriterGone,
)
from diptych.core.fleet import KVEndpoint
from diptych.core.kv_layout import KVLayout, SequenceKV
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import plan_resharding
from diptych.transfer import frames, receiver
from diptych.transfer.faulty import Fault, FaultyWriter
from diptych.wire import handshake
from diptych.wire.blocking import dial
from diptych.wire.messages import WIRE_VERSION

BLOCKS = (5, 6, 2)
LAYERS = range(LAYOUT.num_layers)
each_transport = pytest.mark.parametrize("transport", TRANSPORTS)
each_pair = pytest.mark.parametrize("layout", [LAYOUT, RESHARDED], ids=["equal", "re-sharded"])


def push_layer(made: World, claims: TicketClaims, layer: int) -> None:
    source = SequenceKV(made.source.layout, claims.blocks)
    plan = plan_resharding(source, SequenceKV(LAYOUT, claims.blocks), range(claims.num_tokens))
    made.links[0].push(claims.request_id, claims, plan, [layer])


def hand_over_another(made: World) -> None:
    """The link and the receiver are as good as ever; and so far they have said all they had to say."""
    claims = claims_for("another", (7, 8))
    made.receiver.expect(claims)
    made.push_all(made.links[0], claims, [1, 2])
    assert made.at_target.next() == HandoffComplete("another", TOKEN)
    assert made.at_source.next() == PushAccepted("another")


@each_pair
@each_transport
@pytest.mark.parametrize("layers", [1, 2, len(LAYERS)])
def test_the_source_gives_up(transport: str, layout: KVLayout, layers: int, tmp_path: Path) -> None:
    with world(transport, tmp_path, 0, layout, LAYOUT) as made:
        link, claims = made.link(), claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        for layer in range(layers):
            push_layer(made, claims, layer)
        hand_over_another(made)  # so the pages have arrived
        link.abandon("r1", claims)
        assert made.at_source.next() == PushStopped("r1")
        assert made.at_target.next() == HandoffFailed("r1", "handoff_abandoned", "prefill-0 has given the hand-off up")
        assert made.receiver.book.counts == {"failed hand-off": 1}
        made.receiver.revoke("r1")
        assert made.at_target.next() == WriterGone("r1")
        hand_over_another(made)
        assert made.at_source.empty
        assert made.at_target.empty


@each_pair
@each_transport
def test_the_source_gives_up_what_it_has_not_begun(transport: str, layout: KVLayout, tmp_path: Path) -> None:
    """The target never hears of it, and takes its blocks back when it likes."""
    with world(transport, tmp_path, 0, layout, LAYOUT) as made:
        link, claims = made.link(), claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        link.abandon("r1", claims)
        assert made.at_source.next() == PushStopped("r1")
        hand_over_another(made)
        made.receiver.revoke("r1")
        assert made.at_target.next() == WriterGone("r1")
        assert not made.receiver.book.counts


@each_pair
@each_transport
@pytest.mark.parametrize("layers", [1, len(LAYERS)])
def test_the_target_takes_its_blocks_back(transport: str, layout: KVLayout, layers: int, tmp_path: Path) -> None:
    with world(transport, tmp_path, 0, layout, LAYOUT) as made:
        link, claims = made.link(), claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        for layer in range(layers):
            push_layer(made, claims, layer)
        hand_over_another(made)
        made.receiver.revoke("r1")
        assert made.at_source.next() == PushCancelled("r1")
        assert made.at_target.empty  # the writer has not said that it has stopped
        link.close_handoff("r1", claims, TOKEN)
        link.abandon("r1", claims)
        assert made.at_source.next() == PushStopped("r1")
        assert made.at_target.next() == WriterGone("r1")
        hand_over_another(made)
        assert made.at_target.empty


@each_pair
@each_transport
def test_the_target_takes_back_what_nobody_has_begun(transport: str, layout: KVLayout, tmp_path: Path) -> None:
    with world(transport, tmp_path, 0, layout, LAYOUT) as made:
        link, claims = made.link(), claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        made.receiver.revoke("r1")
        assert made.at_target.next() == WriterGone("r1")
        made.push_all(link, claims, list(BLOCKS))
        rejected = made.at_source.next()
        assert (type(rejected), rejected.code) == (PushRejected, "ticket_refused")
        link.abandon("r1", claims)
        assert made.at_source.next() == PushStopped("r1")
        hand_over_another(made)
        assert made.block(made.target, 0, BLOCKS[0]) == bytes(LAYOUT.block_bytes)


@each_pair
@each_transport
@pytest.mark.parametrize("first", ["stops", "revokes"])
def test_a_failed_handoff_ends_in_either_order(transport: str, layout: KVLayout, first: str, tmp_path: Path) -> None:
    """After a failure the source stops and the target revokes: one PushStopped, one WriterGone."""
    with world(transport, tmp_path, 0, layout, LAYOUT) as made:
        link = made.link(lambda writer: FaultyWriter(writer, {0: Fault.FLIP}))
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        made.push_all(link, claims, list(BLOCKS))
        assert type(made.at_target.next()) is HandoffFailed
        assert type(made.at_source.next()) is PushRejected
        if first == "revokes":
            made.receiver.revoke("r1")
            assert made.at_source.next() == PushCancelled("r1")
        link.abandon("r1", claims)
        assert made.at_source.next() == PushStopped("r1")
        if first == "stops":
            hand_over_another(made)  # so the target has heard of it, and has nothing to say about it
            made.receiver.revoke("r1")
        assert made.at_target.next() == WriterGone("r1")
        hand_over_another(made)
        assert made.at_target.empty
        assert made.at_source.empty


def test_an_unknown_request_has_no_writer(tmp_path: Path) -> None:
    with world("tcp", tmp_path) as made:
        made.receiver.revoke("never heard of")
        assert made.at_target.next() == WriterGone("never heard of")


@pytest.mark.parametrize("transport", SOCKET_TRANSPORTS)
def test_a_receiver_that_ends_loses_its_links(transport: str, tmp_path: Path) -> None:
    with world(transport, tmp_path) as made:
        link, claims = made.link(), claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        push_layer(made, claims, 0)
        hand_over_another(made)
        made.receiver.close()
        assert made.at_source.next() == LinkLost("decode-0", ("r1",))
        assert made.at_target.next().code == "transfer_failed"
        link.abandon("r1", claims)
        assert made.at_source.next() == PushStopped("r1")
        with pytest.raises(OSError):  # noqa: PT011 - refused or gone, it is not there
            dial(made.endpoint.address, KEY, frames.FromTarget)


def test_a_mapped_writer_that_breaks_the_rules_is_gone_only_when_it_hangs_up(tmp_path: Path) -> None:
    """It can write until it has noticed, so its blocks stay in quarantine until then."""
    with world("shm", tmp_path) as made, ScriptedSource(made) as source:
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        source.begin(claims)
        source.connection.send(frames.PushHello(WIRE_VERSION, "prefill-1", LAYOUT, "model", False))
        assert source.connection.receive() is None  # the target is done with it
        made.receiver.revoke("r1")
        source.connection._socket.sendall(bytes(100_000))  # read, and ignored
        assert made.at_target.empty
        source.hang_up()
        assert made.at_target.next() == WriterGone("r1")
        assert made.at_target.empty
        assert made.receiver.book.counts == {"broken connection": 1}


@pytest.mark.fault(45)
@pytest.mark.parametrize("version", [WIRE_VERSION - 1, WIRE_VERSION + 1])
def test_another_wire_version_is_refused(version: int, tmp_path: Path) -> None:
    with world("tcp", tmp_path) as made:
        connection = dial(made.endpoint.address, KEY, frames.FromTarget)
        with contextlib.closing(connection):
            connection.send(frames.PushHello(version, "prefill-1", LAYOUT, "model", False))
            assert connection.receive() == frames.Refused(f"wire version {version} there, {WIRE_VERSION} here")
            assert connection.receive() is None


def test_nothing_is_taken_before_the_hello(tmp_path: Path) -> None:
    with world("tcp", tmp_path) as made:
        claims = claims_for("r1", BLOCKS)
        made.receiver.expect(claims)
        connection = dial(made.endpoint.address, KEY, frames.FromTarget)
        with contextlib.closing(connection), contextlib.suppress(ConnectionError):
            connection.send(frames.Begin("r1", claims.nonce, EPOCH))
            assert connection.receive() is None
        made.receiver.revoke("r1")
        assert made.at_target.next() == WriterGone("r1")


def test_pages_travel_inline_over_a_unix_socket_too(tmp_path: Path) -> None:
    """A target without memory to share takes its pages out of the frames, wherever they come from."""
    with world("tcp", tmp_path) as made:
        made.receiver._target = type(made.receiver._target)(
            key=KEY, epoch=EPOCH, memories=made.targets, model_digest="model"
        )
        made.endpoint = KVEndpoint(transport="tcp", address=made.receiver.listen(f"unix:{tmp_path / 'inline'}"))
        made.link()
        hand_over_another(made)
        assert made.block(made.target, 0, 7) == made.block(made.source, 0, 1)


def test_connections_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with world("tcp", tmp_path) as made:
        monkeypatch.setattr(receiver, "MAX_CONNECTIONS", 2)  # the thread that accepts, and one
        with ScriptedSource(made):
            _, host, port = made.endpoint.address.split(":")
            with socket.create_connection((host, int(port)), timeout=20) as refused:
                assert refused.recv(1) == b""
        assert made.receiver.book.counts["refused connection"] == 1


def test_closing_does_not_wait_for_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not longer, that is, than a handshake may take."""
    monkeypatch.setattr(handshake, "SECONDS", 0.05)
    with world("tcp", tmp_path) as made:
        _, host, port = made.endpoint.address.split(":")
        with socket.create_connection((host, int(port)), timeout=20) as stranger:
            stranger.sendall(handshake.MAGIC)
            made.receiver.close()
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(1) == b""
