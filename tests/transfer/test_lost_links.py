"""What a source does when a link ends at the worst moment: nothing, to memory that may be somebody else's by now."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path

import pytest
from scripted_target import BLOCKS, LAYERS, NOTHING_SECONDS, encounter, writing
from transfer_harness import LAYOUT, Gate, claims_for

from diptych.core.events import LinkLost, PushStopped
from diptych.core.kv_layout import LayerTransfer
from diptych.transfer import frames
from diptych.transfer.pieces import Piece
from diptych.transfer.writers import PageWriter, Payload


class Witness(Gate):
    """Notes what is written after the writer was closed, which is when nobody may write any more."""

    def __init__(self, writer: PageWriter) -> None:
        super().__init__(writer)
        self.closed, self.late = threading.Event(), 0

    def write(
        self, transfer: LayerTransfer, piece: Piece, layer: memoryview, staged: memoryview | None = None
    ) -> Payload:
        self.late += self.closed.is_set()
        return super().write(transfer, piece, layer, staged)

    def close(self) -> None:
        super().close()
        self.closed.set()


class Slow(logging.Handler):
    """A log that takes until something has happened."""

    def __init__(self, happened: threading.Event) -> None:
        super().__init__()
        self._happened = happened
        self.reached = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.reached.set()
        assert self._happened.wait(20)


@pytest.mark.fault(41)
def test_what_is_queued_when_a_link_is_lost_is_not_written(tmp_path: Path) -> None:
    """Even if whoever noticed the loss has not come to stopping the pushes when the connections have ended."""
    witnesses: list[Witness] = []

    def wrap(writer: PageWriter) -> PageWriter:
        witnesses.append(Witness(writer))
        return witnesses[0]

    log = logging.getLogger("diptych.transfer.sender")
    with encounter("shm", tmp_path, wrap) as made:
        claims = claims_for("r1", BLOCKS)
        made.target.meet()
        made.push(claims)
        made.target.go(claims)
        [witness] = witnesses
        assert witness.begun.wait(20)
        slow = Slow(witness.closed)
        log.addHandler(slow)
        try:
            ending = threading.Thread(target=made.link.end)
            ending.start()
            assert slow.reached.wait(20)
            witness.may_go_on.set()
            ending.join(20)
        finally:
            log.removeHandler(slow)
        assert made.events.next() == LinkLost("decode-0", ("r1",))
        made.abandon(claims)
        assert made.events.next() == PushStopped("r1")
        assert witness.late == 0


@pytest.mark.fault(41)
def test_a_further_connection_writes_only_when_the_target_knows_of_it(tmp_path: Path) -> None:
    """Or the link could be over for the target while that thread writes."""
    with writing(tmp_path, num_streams=2) as (made, gate, _), contextlib.closing(made.target.accept()) as second:
        assert second.receive(20) == frames.Join(b"link")
        with pytest.raises(TimeoutError):
            second.receive(NOTHING_SECONDS)
        gate.may_go_on.set()
        assert [made.target.next().layer for _ in LAYERS] == list(LAYERS)


@pytest.mark.parametrize("says", [frames.Probed(), frames.Joined(), frames.PushWelcome(LAYOUT, 1, 0, b"")], ids=repr)
def test_an_answer_out_of_turn_costs_the_link(says: frames.FromTarget, tmp_path: Path) -> None:
    with encounter("tcp", tmp_path) as made:
        claims = claims_for("r1", BLOCKS)
        made.target.meet()
        made.push(claims)
        made.target.go(claims)
        made.target.say(says)
        assert made.events.next() == LinkLost("decode-0", ("r1",))
        made.abandon(claims)
        assert made.events.next() == PushStopped("r1")


def test_a_lost_link_lets_go_of_the_memory_of_its_target(tmp_path: Path) -> None:
    """Else the next life of a target that was killed would not find room for its own."""
    with encounter("shm", tmp_path) as made:
        made.target.meet()
        claims = claims_for("r1", BLOCKS)
        made.push(claims)
        made.target.go(claims)
        assert mappings(made.target.segment.descriptor) == 2
        made.target.connected.end()
        assert made.events.next() == LinkLost("decode-0", ("r1",))
        made.abandon(claims)
        assert made.events.next() == PushStopped("r1")
        made.link.end()
        assert mappings(made.target.segment.descriptor) == 1


def mappings(descriptor: int) -> int:
    """How often this process has mapped a file."""
    inode = str(os.fstat(descriptor).st_ino)
    return sum(line.split()[4] == inode for line in Path("/proc/self/maps").read_text().splitlines())
