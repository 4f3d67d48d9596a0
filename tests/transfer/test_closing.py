"""Ends of receivers, targets and sources: bounded, and nothing is left behind."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from pathlib import Path

import pytest
from transfer_harness import LAYOUT, TOKEN, Gate, ScriptedSource, claims_for, random_memory, world

from diptych.core.errors import ConfigError, TransferError
from diptych.core.events import HandoffComplete, LinkLost, WriterGone
from diptych.transfer import receiver
from diptych.transfer.session import KVSource, KVTarget
from diptych.transfer.writers import PageWriter
from diptych.wire.blocking import listening_socket

KEY = b"k" * 32
NOTHING_SECONDS = 0.05  # long enough to notice something that should not happen


@pytest.mark.fault(41)
def test_closing_waits_for_a_write_that_is_under_way(tmp_path: Path) -> None:
    """What comes next in this memory may be somebody else's."""
    gates, writing = list[Gate](), threading.Event()

    def wrap(writer: PageWriter) -> PageWriter:
        gates.append(Gate(writer))
        writing.set()
        return gates[0]

    with world("shm", tmp_path) as made:
        claims = claims_for("r1", (5, 6, 2))
        made.receiver.expect(claims)
        made.push_all(made.link(wrap), claims, [9, 3, 4])
        assert writing.wait(20)
        assert gates[0].begun.wait(20)
        closing = threading.Thread(target=made.receiver.close)
        closing.start()
        assert isinstance(made.at_source.next(), LinkLost)
        closing.join(NOTHING_SECONDS)
        assert closing.is_alive()
        assert made.at_target.empty
        gates[0].may_go_on.set()
        assert made.at_target.next().code == "transfer_failed"
        closing.join(20)
        assert not closing.is_alive()


def test_closing_does_not_wait_for_a_frozen_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "CLOSE_SECONDS", 0.05)
    with world("shm", tmp_path) as made, ScriptedSource(made) as source:
        assert not made.receiver.close()  # it could write there once more
        monkeypatch.undo()
        source.hang_up()
        assert made.receiver.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_name_that_is_taken_again_waits_for_what_came_of_the_first(transport: str, tmp_path: Path) -> None:
    """The blocks of a hand-off are not given back before its completion has been reported, however long that takes:
    the report would be taken for one about the next hand-off of that name, of which nothing has arrived."""
    reporting, may_go_on = threading.Event(), threading.Event()
    with world(transport, tmp_path) as made:
        put = made.receiver._report

        def report(event: receiver.TargetEvent) -> None:
            if isinstance(event, HandoffComplete):
                reporting.set()
                assert may_go_on.wait(20)
            put(event)

        made.receiver._report = report
        claims = claims_for("r1", (5, 6, 2))
        made.receiver.expect(claims)
        made.push_all(made.link(), claims, [9, 3, 4])
        assert reporting.wait(20)
        made.receiver.revoke("r1")
        assert made.at_target.empty
        may_go_on.set()
        assert made.at_target.next() == HandoffComplete("r1", TOKEN)
        assert made.at_target.next() == WriterGone("r1")


def test_threads_that_cannot_be_had_do_not_end_the_listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, failures = threading.Thread.start, iter([True])

    def sometimes(thread: threading.Thread) -> None:
        if thread.name == "data connection" and next(failures, False):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", sometimes)
    with world("tcp", tmp_path) as made:
        _, host, port = made.endpoint.address.split(":")
        with socket.create_connection((host, int(port)), timeout=20) as refused:
            assert refused.recv(1) == b""
        with ScriptedSource(made) as source:
            assert source.welcome.num_blocks == made.target.num_blocks


def test_an_address_can_be_taken_again(tmp_path: Path) -> None:
    address, path = f"unix:{tmp_path / 'kv'}", tmp_path / "kv"
    with KVTarget(LAYOUT, 4, key=KEY, address=address):
        assert path.exists()
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as killed:  # its name stays
        killed.bind(str(path))
    with KVTarget(LAYOUT, 4, key=KEY, address=address), pytest.raises(OSError, match="in use"):
        listening_socket(address)  # of somebody who is alive
    path.write_text("a file")
    with pytest.raises(OSError, match="in use"):
        listening_socket(address)
    assert path.read_text() == "a file"


def leftovers() -> tuple[set[threading.Thread], int]:
    return set(threading.enumerate()), len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("address", ["tcp:192.0.2.1:0", "tcp:0.0.0.0:0", "nonsense", "unix:/no/such/directory/kv"])
def test_a_target_that_cannot_listen_leaves_nothing_behind(address: str) -> None:
    before = leftovers()
    with pytest.raises((ConfigError, OSError)):
        KVTarget(LAYOUT, 4, key=KEY, address=address)
    assert leftovers() == before


def test_keys_and_addresses_of_sessions_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="at least 32"):
        KVTarget(LAYOUT, 4, key=b"")
    with pytest.raises(ConfigError, match="at least 32"):
        KVSource(key=secrets.token_bytes(31))
    with KVTarget(LAYOUT, 4, key=KEY) as target, KVSource(key=KEY) as source:
        ticket = target.expect("s", 1)
        for address, why in (("tcp:192.0.2.1:7", "TLS"), ("192.0.2.1:7", "no address")):
            with pytest.raises(ConfigError, match=why):
                source.create_session("s", LAYOUT, ticket, address)
        for data_rank in (-1, 1):
            with pytest.raises(ValueError, match="rank"):
                target.expect("t", 1, data_rank=data_rank)
    with pytest.raises(TransferError) as closed:
        target.expect("u", 1)
    assert closed.value.code == "closed"


def test_sources_forget_targets_that_are_gone(tmp_path: Path) -> None:
    with KVSource(key=KEY) as source:
        for number in range(3):
            with KVTarget(LAYOUT, 4, key=KEY, address=f"unix:{tmp_path / str(number)}") as target:
                session = source.create_session("s", LAYOUT, target.expect("s", 1), target.address or "")
                session.push(random_memory(1), blocks=[0])
                session.close(1)
                session.wait(20)
                [link] = source._links.values()
            link._reader.join(20)
            assert link.lost
