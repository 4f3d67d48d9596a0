"""Any number of hand-offs, with any block tables, cut and interleaved in any way: every page arrives where it
belongs, and nothing else changes."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_harness import EPOCH, NUM_BLOCKS, TOKEN, TRANSPORTS, World, claims_for, random_memory, world

from diptych.core.events import HandoffComplete, PushAccepted
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import plan_transfer
from diptych.transfer.sender import PushLink

LAYOUTS = [
    KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype="float32", block_size=4),
    KVLayout(num_layers=1, num_kv_heads=1, head_dim=64, dtype="bfloat16", block_size=16),
    KVLayout(num_layers=5, num_kv_heads=3, head_dim=5, dtype="float16", block_size=7),
    KVLayout(num_layers=2, num_kv_heads=1, head_dim=1, dtype="uint8", block_size=1),
]


@dataclass
class Handoff:
    """One request: which blocks, and where it is cut into chunks."""

    claims: TicketClaims
    source_blocks: list[int]
    cuts: list[int]

    def jobs(self, layout: KVLayout) -> list[tuple[int, int, int]]:
        """(first, end, layer) of every push, chunk by chunk, layer by layer."""
        edges = [self.claims.first_block, *self.cuts, len(self.claims.blocks)]
        chunks = [(first, end) for first, end in zip(edges, edges[1:], strict=False) if first < end]
        return [(first, end, layer) for first, end in chunks for layer in range(layout.num_layers)]

    def push(self, link: PushLink, layout: KVLayout, first: int, end: int, layer: int) -> None:
        blocks = (self.source_blocks[first:end], self.claims.blocks[first:end])
        plan = plan_transfer(layout, layout, *blocks, first_block=first)
        link.push(self.claims.request_id, self.claims, plan, [layer])


@st.composite
def handoffs(draw: st.DrawFn, layout: KVLayout) -> list[Handoff]:
    """Requests whose target blocks are disjoint; their source blocks may be shared (a common prefix)."""
    order = draw(st.permutations(range(NUM_BLOCKS)))
    edges = sorted(draw(st.lists(st.integers(0, NUM_BLOCKS), min_size=1, max_size=4)))
    drawn = []
    for number, (first, end) in enumerate(zip([0, *edges], edges, strict=False)):
        if first == end:
            continue
        blocks = tuple(order[first:end])
        missing_from = draw(st.integers(0, len(blocks)))
        cuts = draw(st.lists(st.integers(missing_from, len(blocks)), max_size=3))
        drawn.append(
            Handoff(
                claims_for(f"r{number}", blocks, missing_from, layout=layout),
                list(draw(st.permutations(range(NUM_BLOCKS))))[: len(blocks)],
                sorted(cuts),
            )
        )
    return drawn


def expected_memory(before: bytes, source: KVMemory, requests: list[Handoff]) -> bytes:
    """What the target's memory should be: the missing blocks of the requests, and otherwise what was there."""
    layout, size = source.layout, source.layout.block_bytes
    after = bytearray(before)
    for request in requests:
        pairs = list(zip(request.source_blocks, request.claims.blocks, strict=True))[request.claims.first_block :]
        for layer in range(layout.num_layers):
            start = layer * NUM_BLOCKS * size
            for ours, theirs in pairs:
                page = source.layer(layer)[ours * size : (ours + 1) * size]
                after[start + theirs * size : start + (theirs + 1) * size] = page
    return bytes(after)


def interleave(link: PushLink, layout: KVLayout, requests: list[Handoff], dice: random.Random) -> None:
    """Push everything, jobs of one request in order, those of different requests in any."""
    queues = [(request, request.jobs(layout)) for request in requests]
    while queues:
        request, jobs = queues[dice.randrange(len(queues))]
        if jobs:
            request.push(link, layout, *jobs.pop(0))
        else:
            link.close_handoff(request.claims.request_id, request.claims, TOKEN)
            queues.remove((request, jobs))


def assert_all_accepted(made: World, requests: list[Handoff]) -> None:
    names = [request.claims.request_id for request in requests]
    assert Counter(made.at_target.next() for _ in names) == Counter(HandoffComplete(name, TOKEN) for name in names)
    assert Counter(made.at_source.next() for _ in names) == Counter(map(PushAccepted, names))
    assert made.at_target.empty
    assert made.at_source.empty


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.dtype}x{layout.block_size}")
def test_every_page_arrives_and_nothing_else_changes(transport: str, layout: KVLayout, tmp_path: Path) -> None:
    with world(transport, tmp_path, layout=layout) as made:
        link = made.link()

        @settings(deadline=None, max_examples=20)
        @given(requests=handoffs(layout), seed=st.integers(0, 2**32))
        def arrive(requests: list[Handoff], seed: int) -> None:
            dice = random.Random(seed)
            made.source.buffer[:] = dice.randbytes(len(made.source.buffer))
            before = bytes(made.target.buffer)
            for request in requests:
                made.receiver.expect(request.claims)
            interleave(link, layout, requests, dice)
            assert_all_accepted(made, requests)
            assert bytes(made.target.buffer) == expected_memory(before, made.source, requests)

        arrive()
        assert not made.receiver.book.counts


def test_several_sources_push_to_one_target(tmp_path: Path) -> None:
    """Four at once, over either transport, each from memory of its own."""
    layout = LAYOUTS[0]
    with world("shm", tmp_path) as made:
        over_tcp = made.receiver.listen("tcp:127.0.0.1:0")
        endpoints = [made.endpoint, type(made.endpoint)(transport="tcp", address=over_tcp)] * 2
        expected = bytes(made.target.buffer)
        for number, made.endpoint in enumerate(endpoints):
            made.sources = (random_memory(number),)
            link = made.link()
            requests = []
            for part in range(3):
                start = 6 * number + 2 * part
                requests.append(Handoff(claims_for(f"s{number}r{part}", (start, start + 1)), [start + 1, start], [1]))
                made.receiver.expect(requests[-1].claims)
            interleave(link, layout, requests, random.Random(number))
            expected = expected_memory(expected, made.source, requests)
        names = [f"s{number}r{part}" for number in range(4) for part in range(3)]
        assert {made.at_target.next() for _ in names} == {HandoffComplete(name, TOKEN) for name in names}
        assert {made.at_source.next() for _ in names} == {PushAccepted(name) for name in names}
        assert bytes(made.target.buffer) == expected


@pytest.mark.fault(40)
def test_two_lives_of_a_target_do_not_mix(tmp_path: Path) -> None:
    """A ticket of the life before is refused, and the same link goes on with one of this life."""
    with world("tcp", tmp_path) as made:
        link = made.link()
        old, new = claims_for("r1", (1, 2), epoch=EPOCH - 1), claims_for("r1", (3, 4))
        made.receiver.expect(new)
        made.push_all(link, old, [1, 2])
        assert made.at_source.next().code == "ticket_refused"
        link.abandon("r1", old)
        made.at_source.next()
        made.push_all(link, new, [1, 2])
        assert made.at_target.next() == HandoffComplete("r1", TOKEN)
        assert made.receiver.book.counts == {"unknown ticket": 1}
        assert made.block(made.target, 0, 1) == bytes(made.target.layout.block_bytes)
