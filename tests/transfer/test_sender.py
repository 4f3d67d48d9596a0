"""The source against a target that says anything it likes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted_target import BLOCKS, IDENTITY, LAYERS, encounter, welcome, writing
from transfer_harness import (
    NUM_BLOCKS,
    SOCKET_TRANSPORTS,
    TOKEN,
    Inbox,
    claims_for,
    random_memory,
)

from diptych.core.events import LinkLost, PushAccepted, PushCancelled, PushRejected, PushStopped
from diptych.core.fleet import KVEndpoint
from diptych.transfer import frames, sender, streams
from diptych.transfer.sender import PushLink


@pytest.mark.parametrize("transport", SOCKET_TRANSPORTS)
def test_a_whole_conversation(transport: str, tmp_path: Path) -> None:
    with encounter(transport, tmp_path) as made:
        target, claims = made.target, claims_for("r1", BLOCKS)
        target.meet()
        made.push(claims)
        target.begun(claims)
        target.hears_nothing()  # until it gives leave
        assert not any(target.segment.buffer)
        target.say(frames.Go("r1", claims.nonce))
        for layer in LAYERS:
            target.take_pages(claims, layer, made.source)
        assert target.next() == frames.Close("r1", claims.nonce, claims.epoch, len(LAYERS), TOKEN, b"")
        assert made.events.empty
        target.say(frames.Accepted("r1", claims.nonce))
        assert made.events.next() == PushAccepted("r1")
        target.say(frames.Accepted("r1", claims.nonce))  # twice
        target.say(frames.Cancel("unknown", b"nonce"))
        assert target.next() == frames.Stopped("unknown", b"nonce")  # so all of the above has been heard
        made.abandon(claims)  # too late to matter
        assert made.events.next() == PushStopped("r1")
        target.hears_nothing()
        assert made.events.empty


@pytest.mark.parametrize("transport", SOCKET_TRANSPORTS)
@pytest.mark.parametrize("layers", [LAYERS, ()], ids=["pages", "only the close"])
def test_no_leave_no_pages_and_no_close(transport: str, layers: Sequence[int], tmp_path: Path) -> None:
    with encounter(transport, tmp_path) as made:
        target, claims = made.target, claims_for("r1", BLOCKS)
        target.meet()
        made.push(claims, layers)
        target.begun(claims)
        target.say(frames.Rejected("r1", claims.nonce, "ticket_refused", "used"))
        assert made.events.next() == PushRejected("r1", "ticket_refused", "used")
        target.hears_nothing()
        made.abandon(claims)
        assert made.events.next() == PushStopped("r1")
        assert target.next() == frames.Stopped("r1", claims.nonce)
        again = claims_for("r1", BLOCKS)  # the same request with a new ticket
        made.push(again)
        target.go(again)
        target.take_pages(again, 0, made.source)
        assert made.events.empty
        assert not any(target.segment.buffer) or transport == "shm"


@pytest.mark.parametrize("transport", SOCKET_TRANSPORTS)
@pytest.mark.parametrize("when", ["before leave", "among the pages", "after the close"])
@pytest.mark.parametrize("answer", [frames.Cancel, frames.Rejected])
def test_a_target_that_does_not_want_it(transport: str, when: str, answer: Any, tmp_path: Path) -> None:
    with encounter(transport, tmp_path) as made:
        target, claims = made.target, claims_for("r1", BLOCKS)
        words = ("kv_corrupt", "pages are corrupt") if answer is frames.Rejected else ()
        event = PushRejected("r1", *words) if words else PushCancelled("r1")
        target.meet()
        made.push(claims, [0], close=False)
        if when == "before leave":
            target.begun(claims)
        else:
            target.go(claims)
            target.take_pages(claims, 0, made.source)
        if when == "after the close":
            made.push(claims, [])
            assert isinstance(target.next(), frames.Close)
        target.say(answer("r1", claims.nonce, *words))
        assert made.events.next() == event
        made.push(claims, [1, 2])  # the compute thread has not heard yet
        target.hears_nothing()
        made.abandon(claims)
        assert made.events.next() == PushStopped("r1")
        assert target.next() == frames.Stopped("r1", claims.nonce)
        target.hears_nothing()
        assert made.events.empty


def test_a_cancelled_request_that_is_over_here_has_stopped(tmp_path: Path) -> None:
    """The target may cancel what was abandoned a moment ago; it needs to hear that nobody writes."""
    with encounter("shm", tmp_path) as made:
        made.target.meet()
        made.target.say(frames.Cancel("r1", b"nonce"))
        assert made.target.next() == frames.Stopped("r1", b"nonce")
        assert made.events.empty


@pytest.mark.parametrize("answer", [frames.Accepted, frames.Cancel])
def test_answers_about_another_ticket_change_nothing(answer: Any, tmp_path: Path) -> None:
    with encounter("tcp", tmp_path) as made:
        target, claims = made.target, claims_for("r1", BLOCKS)
        target.meet()
        made.push(claims, [0], close=False)
        target.go(claims)
        target.take_pages(claims, 0, made.source)
        target.say(answer("r1", b"another nonce"))
        target.say(answer("r2", claims.nonce))
        if answer is frames.Cancel:  # which asks for an answer, whatever it is about
            assert target.next() == frames.Stopped("r1", b"another nonce")
            assert target.next() == frames.Stopped("r2", claims.nonce)
        made.push(claims, [1, 2])
        for layer in (1, 2):
            target.take_pages(claims, layer, made.source)
        assert made.events.empty


@pytest.mark.parametrize("transport", SOCKET_TRANSPORTS)
def test_abandoned_before_it_began(transport: str, tmp_path: Path) -> None:
    with encounter(transport, tmp_path) as made:
        claims = claims_for("r1", BLOCKS)
        made.abandon(claims)
        assert made.target.connection is None
        made.target.meet()
        assert made.events.next() == PushStopped("r1")
        made.target.hears_nothing()


@pytest.mark.parametrize("transport", SOCKET_TRANSPORTS)
@pytest.mark.parametrize("says", ["garbage", "too much", "nothing more"])
def test_a_broken_link_is_reported_once_with_what_was_under_way(transport: str, says: str, tmp_path: Path) -> None:
    with encounter(transport, tmp_path) as made:
        target = made.target
        target.meet()
        all_claims = [claims_for(request_id, BLOCKS) for request_id in ("accepted", "rejected", "r3", "r4")]
        for claims in all_claims:
            made.push(claims)
            target.go(claims)
            for layer in LAYERS:
                target.take_pages(claims, layer, made.source)
            assert isinstance(target.next(), frames.Close)
        target.say(frames.Accepted("accepted", all_claims[0].nonce))
        target.say(frames.Rejected("rejected", all_claims[1].nonce, "code", "why"))
        assert [type(made.events.next()) for _ in range(2)] == [PushAccepted, PushRejected]
        if says == "nothing more":
            target.connected.end_sending()
        else:
            target.connected._socket.sendall(b"\x00\x00\x00\x01\xc1" if says == "garbage" else b"\xff" * 4)
        assert made.events.next() == LinkLost("decode-0", ("r3", "r4"))
        assert made.link.lost
        assert target.next() is None  # and the source has hung up
        for claims in all_claims[1:]:
            made.abandon(claims)
            assert made.events.next() == PushStopped(claims.request_id)
        late = claims_for("late", BLOCKS)
        made.push(late)
        assert made.events.next() == LinkLost("decode-0", ("late",))
        made.abandon(late)
        assert made.events.next() == PushStopped("late")
        assert made.events.empty


@pytest.mark.fault(42)
@pytest.mark.parametrize("transport", SOCKET_TRANSPORTS)
@pytest.mark.parametrize("silent", ["welcome", "leave"])
def test_a_target_that_falls_silent(
    transport: str, silent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (sender, streams):
        monkeypatch.setattr(module, "STALL_SECONDS", 0.05)
    with encounter(transport, tmp_path) as made:
        claims = claims_for("r1", BLOCKS)
        if silent == "welcome":
            made.push(claims)
            made.target.hear_hello()
        else:
            made.target.meet()
            made.push(claims)
            made.target.begun(claims)
        assert made.events.next() == LinkLost("decode-0", ("r1",))
        made.abandon(claims)
        assert made.events.next() == PushStopped("r1")
        assert made.target.next() is None


def test_memory_that_is_not_what_was_announced_is_not_mapped(tmp_path: Path) -> None:
    with encounter("shm", tmp_path) as made:
        claims = claims_for("r1", BLOCKS)
        made.push(claims)
        made.target.hear_hello()
        made.target.say(welcome(NUM_BLOCKS + 1))
        made.target.connected.send_descriptor(made.target.segment.descriptor)
        assert made.events.next() == LinkLost("decode-0", ("r1",))
        assert made.target.next() is None


def test_an_endpoint_on_another_machine_is_a_lost_link() -> None:
    events = Inbox()
    endpoint = KVEndpoint(transport="tcp", address="tcp:192.0.2.1:7")
    link = PushLink("decode-0", endpoint, IDENTITY, [random_memory(1)], events.put)
    claims = claims_for("r1", BLOCKS)
    link.close_handoff("r1", claims, TOKEN)
    assert events.next() == LinkLost("decode-0", ("r1",))
    link.abandon("r1", claims)
    assert events.next() == PushStopped("r1")
    link.end()


def test_the_connection_does_not_end_while_a_write_is_under_way(tmp_path: Path) -> None:
    """The target takes the end of the connection for the end of all writing."""
    with writing(tmp_path) as (made, gate, claims):
        made.target.connected.end_sending()
        assert made.events.next() == LinkLost("decode-0", ("r1",))
        made.abandon(claims)
        made.target.hears_nothing()
        assert made.events.empty
        gate.may_go_on.set()
        assert made.target.next() is None
        assert made.events.next() == PushStopped("r1")


def test_an_abandoned_push_has_stopped_only_when_its_write_is_over(tmp_path: Path) -> None:
    with writing(tmp_path) as (made, gate, claims):
        made.abandon(claims)
        made.target.hears_nothing()
        assert made.events.empty
        gate.may_go_on.set()
        assert made.events.next() == PushStopped("r1")
        made.target.take_pages(claims, 0, made.source)  # what was being written
        assert made.target.next() == frames.Stopped("r1", claims.nonce)


def test_an_ended_link_lets_go_of_everything(tmp_path: Path) -> None:
    with encounter("shm", tmp_path) as made:
        target, open_one, abandoned = made.target, claims_for("open", BLOCKS), claims_for("abandoned", BLOCKS)
        target.meet()
        for claims in (open_one, abandoned):
            made.push(claims, [0], close=False)
            target.go(claims)
            target.take_pages(claims, 0, made.source)
        made.abandon(abandoned)
        assert made.events.next() == PushStopped("abandoned")
        assert target.next() == frames.Stopped("abandoned", abandoned.nonce)
        made.link.end()
        assert made.events.next() == LinkLost("decode-0", ("open",))
        assert target.next() is None
        assert made.events.empty


@pytest.mark.parametrize("transport", SOCKET_TRANSPORTS)
def test_leave_is_asked_for_once(transport: str, tmp_path: Path) -> None:
    """By a thread of the link while it connects, and by the caller afterwards."""
    with encounter(transport, tmp_path) as made:
        target, first, second = made.target, claims_for("r0", BLOCKS), claims_for("r1", BLOCKS)
        made.link.begin("r0", first)
        target.meet()
        target.begun(first)
        made.link.begin("r1", second)
        made.link.begin("r1", second)
        target.begun(second)
        made.push(second)
        target.hears_nothing()
        target.say(frames.Go("r1", second.nonce))
        for layer in LAYERS:
            target.take_pages(second, layer, made.source)
        assert target.next() == frames.Close("r1", second.nonce, second.epoch, len(LAYERS), TOKEN, b"")
