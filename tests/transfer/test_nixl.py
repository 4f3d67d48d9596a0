"""NIXL as a transport. What needs NIXL itself is skipped where it is not installed."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transfer_harness import (
    KEY,
    LAYOUT,
    NUM_BLOCKS,
    TOKEN,
    ScriptedSource,
    World,
    claims_for,
    random_memory,
    world,
)

from diptych.core.errors import ConfigError, TransferError
from diptych.core.events import HandoffComplete, LinkLost, PushAccepted, WriterGone
from diptych.core.kv_layout import KVLayout, KVMemory, LayerTransfer
from diptych.transfer import frames, nixl, nixl_link
from diptych.transfer.faulty import Fault, FaultyWriter
from diptych.transfer.memory import memory_bytes
from diptych.transfer.nixl import NixlTarget, NixlWriter, descriptors
from diptych.transfer.pieces import Piece
from diptych.transfer.places import Places
from diptych.transfer.writers import InlineWriter
from diptych.wire.tickets import mint

CUT = KVLayout(
    num_layers=3, num_kv_heads=2, head_dim=4, dtype="float32", block_size=4, tensor_parallel=2, pipeline_parallel=3
)


@pytest.fixture(params=["all", "tcp,self"])
def ucx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whatever UCX finds best between processes of this machine; and TCP, in which a copy is not at once there."""
    pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
    monkeypatch.setenv("UCX_TLS", request.param)
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    return str(request.param)


# without NIXL


runs = st.lists(st.integers(1, 50), min_size=1, max_size=10)


@given(ours=runs, data=st.data())
def test_descriptors_are_cut_where_a_run_of_either_side_ends(ours: list[int], data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, sum(ours))).map(lambda cuts: sorted(cuts | {sum(ours)})))
    theirs = np.diff([0, *cuts])
    places = data.draw(st.permutations(range(len(ours)))), data.draw(st.permutations(range(len(theirs))))
    starts = [np.array(order) * 1000 + 5 for order in places]
    sides = descriptors((starts[0], np.array(ours)), (starts[1], theirs))
    for side, start, lengths in zip(sides, starts, (ours, theirs), strict=True):
        one_by_one = [first + offset for first, length in zip(start, lengths, strict=True) for offset in range(length)]
        assert [first + offset for first, length, _ in side.tolist() for offset in range(length)] == one_by_one
    assert sides[0][:, 1].tolist() == sides[1][:, 1].tolist()
    assert len(sides[0]) == len({*np.cumsum(ours).tolist(), *cuts})


def test_without_nixl_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "MODULES", ("no_such_module",))
    nixl.load.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'diptych\[nixl\]'"):
        nixl.load()


def test_a_target_that_does_not_offer_it_opens_no_port(tmp_path: Path) -> None:
    """Whatever a source wishes for: nothing of NIXL is even imported."""
    with world("tcp", tmp_path) as made:
        made.endpoint = type(made.endpoint)(transport="nixl", address=made.endpoint.address)
        claims = claims_for("r1", (1, 2))
        made.push_all(made.link(), claims, [1, 2])
        assert made.at_source.next() == LinkLost("decode-0", ("r1",))
        made.receiver.close()
        assert made.receiver.book.counts["broken connection"] == 1


def test_a_probe_that_nobody_asked_for_costs_the_connection(tmp_path: Path) -> None:
    with world("tcp", tmp_path) as made, ScriptedSource(made) as source:
        source.connection.send(frames.Probe(4), [memoryview(b"page")])
        assert source.connection.receive() is None
        claims = claims_for("r1", (1, 2))
        made.receiver.expect(claims)
        made.push_all(made.link(), claims, [1, 2])  # others are served
        assert made.at_target.next() == HandoffComplete("r1", TOKEN)


@pytest.mark.parametrize(
    "lie",
    [{"bases": ()}, {"bases": (1 << 40, 1 << 41)}, {"bases": (-1,)}, {"bases": (1 << 70,)}, {"scratch": 0}]
    + [{"metadata": bytes(1 << 17)}],
    ids=["no rank", "a rank too many", "negative", "no address", "no scratch", "endless metadata"],
)
def test_a_welcome_that_makes_no_sense_is_refused_before_nixl_hears_of_it(lie: dict[str, Any]) -> None:
    memory = frames.NixlWelcome(**{"metadata": b"metadata", "bases": (1 << 40,), "scratch": 1 << 41, **lie})
    with pytest.raises(TransferError, match="the target's NIXL memory"):
        NixlWriter(frames.PushWelcome(LAYOUT, NUM_BLOCKS, 0, b"link"), memory, [])


def test_the_faster_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Writer:
        def __init__(self, *_: Any) -> None:
            self.closed = False
            made.append(self)

        def probe(self) -> None:
            pass

        def close(self) -> None:
            self.closed = True

    class Connection:
        def __init__(self) -> None:
            self.answers = [frames.NixlWelcome(b"", (), 0)] + [frames.Probed()] * nixl_link.NUM_PROBES

        def send(self, *_: Any) -> None:
            pass

        def receive(self, _: float) -> Any:
            return self.answers.pop(0)

    monkeypatch.setattr(nixl_link, "NixlWriter", Writer)
    for rates, kept in (((2.0, 1.0), True), ((1.0, 2.0), False)):
        remaining = list(rates)
        monkeypatch.setattr(nixl_link, "gb_per_second", lambda _, remaining=remaining: remaining.pop(0))
        writer = nixl_link.nixl_writer(Connection(), None, [], measure=True)  # type: ignore[arg-type]
        assert isinstance(writer, Writer if kept else InlineWriter)
        assert made[-1].closed is not kept


# with NIXL


@pytest.mark.parametrize("transport", ["nixl", "fastest"])
def test_pages_arrive_between_any_layouts(ucx: str, transport: str, tmp_path: Path) -> None:
    for source, target in ((LAYOUT, LAYOUT), (LAYOUT, CUT), (CUT, LAYOUT)):
        directory = tmp_path / f"{source.world_size}-{target.world_size}"
        directory.mkdir()
        with (
            world(transport, directory, 3, source, target) as made,
            world("local", directory, 3, source, target) as same,
        ):
            for number, tables in enumerate((((5, 9, 1), (2, 3, 4)), ((8, 7), (20, 19)), ((0,), (11,)))):
                for each in (made, same):
                    link = each.links[0] if each.links else each.link()
                    claims = claims_for(f"r{number}", tables[1], layout=target, first_block=number % 2)
                    each.receiver.expect(claims)
                    each.push_all(link, claims, tables[0])
                    assert each.at_target.next() == HandoffComplete(f"r{number}", TOKEN)
                    assert each.at_source.next() == PushAccepted(f"r{number}")
            for written, copied in zip(made.targets, same.targets, strict=True):
                assert bytes(written.buffer) == bytes(copied.buffer)


@pytest.mark.parametrize("fault", list(Fault))
def test_damage_is_noticed(ucx: str, fault: Fault, tmp_path: Path) -> None:
    with world("nixl", tmp_path, seed=5) as made:
        claims = claims_for("r1", (3, 4, 8, 1))
        made.receiver.expect(claims)
        made.push_all(made.link(lambda writer: FaultyWriter(writer, {1: fault})), claims, [1, 2, 3, 4])
        assert made.at_target.next().code == "kv_corrupt"
        assert made.at_source.next().code == "kv_corrupt"


def test_a_source_that_is_killed_gives_up_its_hold_on_the_blocks(ucx: str, tmp_path: Path) -> None:
    with world("nixl", tmp_path) as made:
        claims = claims_for("r1", (3, 4, 8, 1))
        made.receiver.expect(claims)
        with other_process(made, "one layer", claims) as process:
            assert process.stdout is not None
            assert "written" in process.stdout.readline()
            made.receiver.revoke("r1")
            process.kill()
        assert made.at_target.next() == WriterGone("r1")


def test_another_process_hands_over(ucx: str, tmp_path: Path) -> None:
    with world("nixl", tmp_path, seed=9) as made:
        claims = claims_for("r1", (3, 4, 8, 1))
        made.receiver.expect(claims)
        with other_process(made, "all layers", claims) as process:
            output, _ = process.communicate(timeout=60)
        assert "PushAccepted" in output
        assert made.at_target.next() == HandoffComplete("r1", TOKEN)
        for layer in range(LAYOUT.num_layers):
            for block in claims.blocks:
                assert made.block(made.target, layer, block) == made.block(random_memory(9), layer, block)


def test_a_target_that_goes_away_ends_the_link(ucx: str, tmp_path: Path) -> None:
    with world("nixl", tmp_path) as made:
        link = made.link()
        first, second = claims_for("r1", (3, 4)), claims_for("r2", (5, 6))
        made.receiver.expect(first)
        made.receiver.expect(second)
        made.push_all(link, first, [3, 4])
        assert made.at_source.next() == PushAccepted("r1")
        made.receiver.close()
        made.push_all(link, second, [5, 6])
        assert made.at_source.next() == LinkLost("decode-0", ("r2",))


def test_registered_memory_staged_bytes_and_any_other_memory_arrive(ucx: str) -> None:
    size = NUM_BLOCKS * LAYOUT.block_bytes
    content = np.random.default_rng(1).integers(0, 256, 3 * size, dtype=np.uint8)
    with pair([content.data]) as (target, writer):
        transfer, backwards = LayerTransfer(1, 0, 0, ()), np.arange(0, size, size // 4)[::-1]
        piece = piece_of(Places(np.array([0]), np.array([size])), Places(backwards, np.full(4, size // 4)))
        for layer, staged in ((content[size : 2 * size].data, None), (content[:0].data, content[:size].copy().data)):
            assert writer.write(transfer, piece, layer, staged) == ()
            assert bytes(target.layer(1)) == b"".join(np.split(np.frombuffer(staged or layer, np.uint8), 4)[::-1])
        other = content[::-1].copy()[:size].data
        assert writer.write(transfer, piece, other) == ()
        assert bytes(target.layer(1)) == b"".join(np.split(np.frombuffer(other, np.uint8), 4)[::-1])
        assert not any(target.layer(0))
        assert not any(target.layer(2))


def test_nothing_is_written_outside_of_a_layer(ucx: str) -> None:
    size = NUM_BLOCKS * LAYOUT.block_bytes
    with pair([]) as (target, writer):
        for start in (-1, 1):
            piece = piece_of(Places(np.array([0]), np.array([size])), Places(np.array([start]), np.array([size])))
            with pytest.raises(TransferError, match="leave a layer"):
                writer.write(LayerTransfer(1, 0, 0, ()), piece, memoryview(b"x" * size))
        assert not any(target.buffer)


def test_what_is_under_way_does_not_arrive_after_the_targets_agent_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TCP, where UCX's own thread of the target writes: the fence on which quarantine relies."""
    pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    size = 16 << 20
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1 << 15, dtype="uint8", block_size=16)  # 1 MiB blocks
    memory = KVMemory(layout, 16, memoryview(bytearray(size)))
    target = NixlTarget(b"link", [memory])
    writer = NixlWriter(frames.PushWelcome(layout, 16, 0, b"link"), target.welcome, [])
    writer.probe()
    places = Places(np.array([0]), np.array([size]))
    begun, failed = threading.Event(), threading.Event()

    def write_on_and_on() -> None:
        contents = itertools.cycle(memoryview(bytes([value]) * size) for value in (1, 2, 3))
        with contextlib.suppress(TransferError):
            for content in contents:
                writer.write(LayerTransfer(0, 0, 0, ()), piece_of(places, places), content)
                begun.set()
        failed.set()

    thread = threading.Thread(target=write_on_and_on)
    thread.start()
    assert begun.wait(60)
    target.close()
    after = bytes(memory.buffer)
    assert failed.wait(60)
    thread.join()
    assert bytes(memory.buffer) == after
    writer.close()


OTHER_PROCESS = """
import sys
from diptych.policy.resharding import plan_transfer
from diptych.wire.tickets import open_ticket
from transfer_harness import *
claims = open_ticket(bytes.fromhex(sys.argv[1]), KEY)
inbox = Inbox()
identity = Identity(key=KEY, worker_id="prefill-0", model_digest="model")
link = PushLink("decode-0", KVEndpoint(transport="nixl", address=sys.argv[2]), identity, [random_memory(9)], inbox.put)
plan = plan_transfer(LAYOUT, LAYOUT, claims.blocks, claims.blocks, first_block=0)
if sys.argv[3] == "all layers":
    for layer in range(LAYOUT.num_layers):
        link.push(claims.request_id, claims, plan, [layer])
    link.close_handoff(claims.request_id, claims, TOKEN)
    print(inbox.next(), flush=True)
else:
    link.push(claims.request_id, claims, plan, [0])
    link.close_handoff("no ticket", claims_for("no ticket", (1,)), TOKEN)  # turned away, after the push
    print("written", inbox.next(), flush=True)
    sys.stdin.read()
link.end()
"""


def other_process(made: World, what: str, claims: Any) -> subprocess.Popen[str]:
    address = made.endpoint.address  # type: ignore[union-attr]
    return subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, mint(claims, KEY).hex(), address, what],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def pair(sources: Sequence[memoryview]) -> Iterator[tuple[KVMemory, NixlWriter]]:
    """A target's memory, and a writer into it."""
    memory = KVMemory(LAYOUT, NUM_BLOCKS, memoryview(bytearray(memory_bytes(LAYOUT, NUM_BLOCKS, 0))))
    target = NixlTarget(b"link", [memory])
    writer = NixlWriter(frames.PushWelcome(LAYOUT, NUM_BLOCKS, 0, b"link"), target.welcome, sources)
    yield memory, writer
    writer.close()
    target.close()


def piece_of(source: Places, target: Places) -> Piece:
    return Piece(0, source, target, [source.nbytes], None, None)
