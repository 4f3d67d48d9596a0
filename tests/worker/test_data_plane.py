"""The data plane never makes its caller wait, who is the loop that a worker's heartbeats come from."""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diptych.core.events import HandoffFailed, LinkLost, PushStopped, WriterGone
from diptych.core.fleet import KVEndpoint, Role
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.request import SampledToken
from diptych.core.settings import WorkerSettings
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import plan_transfer
from diptych.transfer import frames, pieces
from diptych.transfer.memory import SharedMemory, memory_bytes
from diptych.wire.blocking import BlockingConnection, accept, dial, listening_socket
from diptych.wire.codec import encode_frame
from diptych.wire.messages import WIRE_VERSION
from diptych.worker.data_plane import DataPlane, SharedKV

KEY = b"k" * 32
LAYOUT = KVLayout(num_layers=1, num_kv_heads=2, head_dim=256, dtype="float32", block_size=256)
NUM_BLOCKS = 32  # 32 MiB, which no socket buffers
SECONDS = 20


class Plane:
    """A data plane and what it reports."""

    def __init__(self, directory: Path, transport: str) -> None:
        self.segment = SharedMemory(memory_bytes(LAYOUT, NUM_BLOCKS, 0))
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        kv = SharedKV((KVMemory(LAYOUT, NUM_BLOCKS, self.segment.buffer),), (self.segment,))
        settings = WorkerSettings(
            worker_id="w",
            role=Role.MIXED,
            epoch=1,
            router="",
            key=KEY,
            run_dir=str(directory),
            transports=(transport,),
        )
        self.data = DataPlane(settings, kv, "model", self.events.put)

    def next(self) -> Any:
        return self.events.get(timeout=SECONDS)


@contextlib.contextmanager
def plane(directory: Path, transport: str) -> Iterator[Plane]:
    made = Plane(directory, transport)
    try:
        yield made
    finally:
        made.data.close()
        with contextlib.suppress(BufferError):
            made.segment.close()


def claims_for(worker_id: str, epoch: int) -> TicketClaims:
    return TicketClaims(
        request_id="r1",
        worker_id=worker_id,
        epoch=epoch,
        blocks=tuple(range(NUM_BLOCKS)),
        first_block=0,
        num_tokens=NUM_BLOCKS * LAYOUT.block_size,
        layout=LAYOUT,
        model_digest="model",
        salt="",
        nonce=b"nonce",
    )


def without_waiting(call: Callable[..., Any], *arguments: Any) -> None:
    """The call returns although nobody else does anything."""
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive()


@pytest.mark.fault(42)
def test_a_target_that_does_not_read_is_replaced_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "FRAME_BYTES", 1 << 30)
    listener, address = listening_socket("tcp:127.0.0.1:0")
    endpoint = KVEndpoint(transport="tcp", address=address)
    claims = claims_for("decode-0", 1)
    with listener, plane(tmp_path, "tcp") as made:
        made.data.open_link("decode-0", 1, endpoint)
        blocks = list(range(NUM_BLOCKS))
        made.data.push("r1", claims, plan_transfer(LAYOUT, LAYOUT, blocks, claims.blocks, first_block=0), [0])
        with life(listener) as deaf:
            assert isinstance(deaf.receive(SECONDS), frames.Begin)
            deaf.send(frames.Go("r1", b"nonce"))
            assert isinstance(deaf.receive(SECONDS), frames.Pages)
            without_waiting(made.data.open_link, "decode-0", 2, endpoint)
            assert made.next() == LinkLost("decode-0", ("r1",))
            made.data.abandon("r1", claims)
            assert made.events.empty()  # its pages are still being read
        assert made.next() == PushStopped("r1")
        made.data.open_link("decode-0", 1, endpoint)  # late: that life is over
        made.data.close_handoff("r1", claims_for("decode-0", 2), SampledToken(1))
        with life(listener) as alive:
            assert alive.receive(SECONDS) == frames.Begin("r1", b"nonce", 2)


@contextlib.contextmanager
def life(listener: socket.socket) -> Iterator[BlockingConnection[Any]]:
    """The first connection of a link whose target takes it, and knows of another one."""
    with contextlib.ExitStack() as closing:
        both: list[BlockingConnection[Any]] = []
        for expected in (frames.PushHello, frames.Join):
            both.append(accept(listener.accept()[0], KEY, frames.FromSource))
            closing.callback(both[-1].close)
            assert isinstance(both[-1].receive(SECONDS), expected)
            if expected is frames.PushHello:
                both[0].send(frames.PushWelcome(LAYOUT, NUM_BLOCKS, 0, b"link"))
        yield both[0]


@pytest.mark.fault(42)
def test_a_source_that_does_not_read_is_revoked_without_waiting(tmp_path: Path) -> None:
    with plane(tmp_path, "shm") as made:
        claims = claims_for("w", 1)
        made.data.expect(claims)
        connection: BlockingConnection[Any] = dial(made.data.endpoints[0].address, KEY, frames.FromTarget)
        with contextlib.closing(connection):
            connection.send(frames.PushHello(WIRE_VERSION, "p", LAYOUT, "model", False))
            assert isinstance(connection.receive(SECONDS), frames.PushWelcome)
            connection.send(frames.Begin("r1", b"nonce", 1))
            _ask_and_do_not_listen(connection._socket)
            without_waiting(made.data.revoke, "r1")
        events = [made.next()]
        while not isinstance(events[-1], WriterGone):
            events.append(made.next())
        assert all(isinstance(event, HandoffFailed) for event in events[:-1])


def _ask_and_do_not_listen(sock: Any) -> None:
    """Until the target, which has to answer each time, takes no more."""
    sock.setblocking(False)
    question = encode_frame(frames.Begin("nobody", b"", 1))
    writable = select.poll()
    writable.register(sock, select.POLLOUT)
    while writable.poll(1000):
        with contextlib.suppress(BlockingIOError):
            sock.sendall(question)
