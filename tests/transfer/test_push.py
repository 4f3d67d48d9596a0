"""Whole hand-offs, source to target, over each transport: intact ones arrive, damaged ones never count."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from transfer_harness import (
    KEY,
    LAYOUT,
    NUM_BLOCKS,
    RESHARDED,
    SOCKET_TRANSPORTS,
    TOKEN,
    TRANSPORTS,
    Inbox,
    World,
    claims_for,
    random_memory,
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
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import plan_transfer
from diptych.transfer import pieces
from diptych.transfer.faulty import Fault, FaultyWriter
from diptych.transfer.sender import Identity, PushLink
from diptych.wire.tickets import mint

LAYERS = range(LAYOUT.num_layers)


def random_tables(seed: int, count: int) -> tuple[list[int], tuple[int, ...]]:
    dice = random.Random(seed)
    return dice.sample(range(NUM_BLOCKS), count), tuple(dice.sample(range(NUM_BLOCKS), count))


def assert_arrived(made: World, source_blocks: list[int], target_blocks: tuple[int, ...], first: int) -> None:
    """The sent blocks are equal on both sides, and every other byte of the target is still zero."""
    came_from = dict(zip(target_blocks[first:], source_blocks[first:], strict=True))
    for layer in LAYERS:
        for block in range(NUM_BLOCKS):
            wanted = bytes(LAYOUT.block_bytes)
            if block in came_from:
                wanted = made.block(made.source, layer, came_from[block])
            assert made.block(made.target, layer, block) == wanted


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("seed", "count", "cached"), [(1, 1, 0), (2, 7, 0), (3, 24, 5), (4, 10, 10), (5, 20, 19)])
def test_a_handoff_arrives(transport: str, seed: int, count: int, cached: int, tmp_path: Path) -> None:
    source_blocks, target_blocks = random_tables(seed, count)
    with world(transport, tmp_path, seed) as made:
        claims = claims_for("r1", target_blocks, cached)
        made.receiver.expect(claims)
        made.push_all(made.link(), claims, source_blocks)
        assert made.at_target.next() == HandoffComplete("r1", TOKEN)
        assert made.at_source.next() == PushAccepted("r1")
        assert_arrived(made, source_blocks, target_blocks, cached)
        made.receiver.revoke("r1")  # too late: there is no writer any more
        assert made.at_target.next() == WriterGone("r1")


@pytest.mark.fault(40)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_chunks_layers_in_any_order_and_duplicates_arrive(transport: str, tmp_path: Path) -> None:
    source_blocks, target_blocks = random_tables(6, 9)
    jobs = [(first, end, layer) for first, end in ((0, 4), (4, 9)) for layer in LAYERS] * 2
    random.Random(7).shuffle(jobs)
    with world(transport, tmp_path) as made:
        claims = claims_for("r1", target_blocks)
        made.receiver.expect(claims)
        link = made.link()
        for first, end, layer in jobs:
            blocks = (source_blocks[first:end], target_blocks[first:end])
            link.push("r1", claims, plan_transfer(LAYOUT, LAYOUT, *blocks, first_block=first), [layer])
        link.close_handoff("r1", claims, TOKEN)
        assert made.at_target.next() == HandoffComplete("r1", TOKEN)
        assert_arrived(made, source_blocks, target_blocks, 0)
        assert made.receiver.book.counts["duplicate pages"] == len(jobs) // 2


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("pages_per_frame", [1, 2, 5])
def test_a_layer_may_take_several_frames(
    transport: str, pages_per_frame: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", LAYOUT.block_bytes)
    monkeypatch.setattr(pieces, "FRAME_BYTES", pages_per_frame * LAYOUT.block_bytes)
    for number, tables in enumerate((random_tables(6, 9), (list(range(3, 12)), tuple(range(9))))):
        directory = tmp_path / str(number)
        directory.mkdir()
        with world(transport, directory) as made:
            claims = claims_for("r1", tables[1], first_block=1)
            made.receiver.expect(claims)
            made.push_all(made.link(), claims, tables[0])
            assert made.at_target.next() == HandoffComplete("r1", TOKEN)
            assert_arrived(made, *tables, 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_requests_share_a_link(transport: str, tmp_path: Path) -> None:
    with world(transport, tmp_path) as made:
        link = made.link()
        all_claims = [claims_for(f"r{number}", (2 * number, 2 * number + 1)) for number in range(10)]
        for claims in all_claims:
            made.receiver.expect(claims)
        for claims in all_claims:
            made.push_all(link, claims, [5, 3])
        assert {made.at_target.next() for _ in all_claims} == {
            HandoffComplete(claims.request_id, TOKEN) for claims in all_claims
        }
        for claims in all_claims:
            for layer in LAYERS:
                assert made.block(made.target, layer, claims.blocks[0]) == made.block(made.source, layer, 5)


@pytest.mark.fault(39)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("write", LAYERS)
@pytest.mark.parametrize("layout", [LAYOUT, RESHARDED], ids=["equal", "re-sharded"])
def test_no_damage_is_accepted(transport: str, fault: Fault, write: int, layout: KVLayout, tmp_path: Path) -> None:
    source_blocks, target_blocks = random_tables(8, 6)
    with world(transport, tmp_path, 0, layout, LAYOUT) as made:
        claims = claims_for("bad", target_blocks)
        made.receiver.expect(claims)
        link = made.link(lambda writer: FaultyWriter(writer, {write: fault}, seed=write))
        made.push_all(link, claims, source_blocks)
        failed = made.at_target.next()
        assert isinstance(failed, HandoffFailed)
        assert failed.request_id == "bad"
        assert failed.code in ("kv_corrupt", "transfer_failed")
        assert made.at_source.next() == PushRejected("bad", failed.code, failed.message)
        made.receiver.revoke("bad")
        assert made.at_source.next() == PushCancelled("bad")
        assert made.at_target.empty
        link.abandon("bad", claims)
        assert made.at_source.next() == PushStopped("bad")
        assert made.at_target.next() == WriterGone("bad")

        good = claims_for("good", target_blocks)  # the link and the blocks are as good as ever
        made.receiver.expect(good)
        made.push_all(link, good, source_blocks)
        assert made.at_target.next() == HandoffComplete("good", TOKEN)
        if layout == LAYOUT:
            assert_arrived(made, source_blocks, target_blocks, 0)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_missing_layer_is_noticed(transport: str, tmp_path: Path) -> None:
    with world(transport, tmp_path) as made:
        claims = claims_for("r1", (1, 2))
        made.receiver.expect(claims)
        link = made.link()
        link.push("r1", claims, plan_transfer(LAYOUT, LAYOUT, [1, 2], [1, 2], first_block=0), [0])
        link.close_handoff("r1", claims, TOKEN)
        assert isinstance(made.at_target.next(), HandoffFailed)
        assert isinstance(made.at_source.next(), PushRejected)


def test_an_abandoned_push_stops_and_tells_both_sides(tmp_path: Path) -> None:
    with world("shm", tmp_path) as made:
        claims = claims_for("r1", (1, 2))
        made.receiver.expect(claims)
        link = made.link()
        link.push("r1", claims, plan_transfer(LAYOUT, LAYOUT, [1, 2], [1, 2], first_block=0), [0])
        link.abandon("r1", claims)
        link.push("r1", claims, plan_transfer(LAYOUT, LAYOUT, [1, 2], [1, 2], first_block=0), [1])
        assert made.at_source.next() == PushStopped("r1")
        made.receiver.revoke("r1")
        events = [made.at_target.next()]
        if isinstance(events[0], HandoffFailed):  # the target saw it begin before it heard that it had stopped
            events.append(made.at_target.next())
        assert events[-1] == WriterGone("r1")


def test_the_end_of_a_target_is_reported_once_for_all_requests(tmp_path: Path) -> None:
    with world("tcp", tmp_path) as made:
        link = made.link()
        for request_id in ("r1", "r2"):
            claims = claims_for(request_id, (1, 2))
            made.receiver.expect(claims)
            link.push(request_id, claims, plan_transfer(LAYOUT, LAYOUT, [1, 2], [1, 2], first_block=0), [0])
        link.close_handoff("r2", claims, TOKEN)  # pages are missing: so the target has seen all of the above
        assert isinstance(made.at_source.next(), PushRejected)
        made.receiver.close()
        assert made.at_source.next() == LinkLost("decode-0", ("r1",))
        assert link.lost
        link.abandon("r1", claims_for("r1", (1, 2)))
        late = claims_for("r3", (3,))
        made.push_all(link, late, [3])
        events = {made.at_source.next() for _ in range(3)}
        assert LinkLost("decode-0", ("r3",)) in events
        assert PushStopped("r1") in events


def test_a_target_that_is_not_there_is_a_lost_link() -> None:
    at_source = Inbox()
    endpoint = KVEndpoint(transport="shm", address="unix:/nonexistent/kv")
    identity = Identity(key=KEY, worker_id="prefill-0", model_digest="model")
    link = PushLink("decode-0", endpoint, identity, [random_memory(0)], at_source.put)
    claims = claims_for("r1", (1,))
    link.close_handoff("r1", claims, TOKEN)
    assert at_source.next() == LinkLost("decode-0", ("r1",))
    link.abandon("r1", claims)
    assert at_source.next() == PushStopped("r1")
    link.end()


@pytest.mark.parametrize("other", ["layout", "model", "key"])
def test_a_source_that_does_not_fit_is_refused(other: str, tmp_path: Path) -> None:
    with world("tcp", tmp_path) as made:
        identity = Identity(
            key=b"x" * 32 if other == "key" else KEY,
            worker_id="prefill-0",
            model_digest="another" if other == "model" else "model",
        )
        source = made.source
        if other == "layout":
            layout = type(LAYOUT)(num_layers=3, num_kv_heads=4, head_dim=2, dtype="float32", block_size=4)
            source = KVMemory(layout, NUM_BLOCKS, source.buffer)
        made.links.append(PushLink("decode-0", made.endpoint, identity, [source], made.at_source.put))
        claims = claims_for("r1", (1,))
        made.links[0].close_handoff("r1", claims, TOKEN)
        assert made.at_source.next() == LinkLost("decode-0", ("r1",))
        made.links.pop().end()
        made.receiver.expect(claims)
        made.push_all(made.link(), claims, [1])  # one that fits is served
        assert made.at_target.next() == HandoffComplete("r1", TOKEN)


OTHER_PROCESS = """
import sys
from diptych.wire.tickets import open_ticket
from transfer_harness import *
from diptych.policy.resharding import plan_transfer
claims = open_ticket(bytes.fromhex(sys.argv[2]), KEY)
inbox = Inbox()
identity = Identity(key=KEY, worker_id="prefill-0", model_digest="model")
endpoint = KVEndpoint(transport=sys.argv[1], address=sys.argv[3])
link = PushLink("decode-0", endpoint, identity, [random_memory(9)], inbox.put)
plan = plan_transfer(LAYOUT, LAYOUT, claims.blocks, claims.blocks, first_block=0)
layers = LAYOUT.num_layers if sys.argv[4] == "all" else 1
for layer in range(layers):
    link.push(claims.request_id, claims, plan, [layer])
if sys.argv[4] == "all":
    link.close_handoff(claims.request_id, claims, TOKEN)
    print(inbox.next(), flush=True)
else:
    probe = claims_for("probe", (1,))
    link.close_handoff("probe", probe, TOKEN)
    print(inbox.next(), flush=True)
    sys.stdin.read()
link.end()
"""


def other_process(made: World, claims: TicketClaims, what: str) -> subprocess.Popen[str]:
    arguments = [made.endpoint.transport, mint(claims, KEY).hex(), made.endpoint.address, what]
    return subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, *arguments],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("transport", SOCKET_TRANSPORTS)
def test_another_process_hands_over(transport: str, tmp_path: Path) -> None:
    with world(transport, tmp_path, seed=9) as made:
        claims = claims_for("r1", (3, 4, 8, 1))
        made.receiver.expect(claims)
        with other_process(made, claims, "all") as process:
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "PushAccepted" in output
        assert made.at_target.next() == HandoffComplete("r1", TOKEN)
        assert_arrived(made, list(claims.blocks), claims.blocks, 0)


@pytest.mark.fault(31, 41)
@pytest.mark.parametrize("transport", SOCKET_TRANSPORTS)
def test_a_source_that_is_killed_gives_up_its_hold_on_the_blocks(transport: str, tmp_path: Path) -> None:
    with world(transport, tmp_path) as made:
        claims = claims_for("r1", (3, 4, 8, 1))
        made.receiver.expect(claims)
        with other_process(made, claims, "some") as process:
            assert process.stdout is not None
            assert "PushRejected" in process.stdout.readline()  # of the probe, sent after the first layer
            made.receiver.revoke("r1")
            process.kill()
        assert made.at_target.next() == WriterGone("r1")
        assert made.at_target.empty
