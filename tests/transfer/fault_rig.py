"""A source and a target for one injected fault after another, and what has to be true after each."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from raw_source import RawSource, Sendable
from transfer_harness import NUM_BLOCKS, TOKEN, World, claims_for

from diptych.core.blocks import blocks_for
from diptych.core.events import HandoffComplete, HandoffFailed, WriterGone
from diptych.core.kv_layout import LayerTransfer, SequenceKV
from diptych.core.ticket import TicketClaims
from diptych.policy.block_pool import BlockPool
from diptych.policy.resharding import plan_resharding
from diptych.transfer import frames
from diptych.transfer.faulty import Fault, FaultyWriter
from diptych.transfer.pieces import Piece
from diptych.transfer.writers import PageWriter, Payload

MAX_TOKENS = 40


class Unharmed(Exception):
    """The dice put the fault where it makes no difference, and so the right bytes were served (only one unit to
    exchange, or the same bytes were there before): try again."""


@dataclass(slots=True)
class Request:
    """One hand-off: `blocks` of the target's pool are its own."""

    claims: TicketClaims
    source: SequenceKV
    blocks: list[int]

    @property
    def tokens(self) -> range:
        return range(self.claims.first_block * self.claims.layout.block_size, self.claims.num_tokens)

    @property
    def target(self) -> SequenceKV:
        return SequenceKV(self.claims.layout, self.claims.blocks, data_rank=self.claims.data_rank)


class Switch:
    """A writer whose next write can be made to go wrong."""

    def __init__(self, writer: PageWriter) -> None:
        self._writer = writer
        self.faulty: FaultyWriter | None = None

    def arm(self, plan: dict[int, Fault], seed: int) -> None:
        self.faulty = FaultyWriter(self._writer, plan, seed)

    def needs_staging(self, piece: Piece) -> bool:
        return self._writer.needs_staging(piece)

    def write(
        self, transfer: LayerTransfer, piece: Piece, layer: memoryview, staged: memoryview | None = None
    ) -> Payload:
        return (self.faulty or self._writer).write(transfer, piece, layer, staged)

    def close(self) -> None:
        self._writer.close()


class Rig:
    """A source, a target with a pool of blocks, and what is certain after each injection."""

    def __init__(self, made: World, dice: random.Random) -> None:
        self.made = made
        self.dice = dice
        self.pool = BlockPool(NUM_BLOCKS, made.target.layout.block_size)
        self.switches: list[Switch] = []
        self.link = made.link(self._wrap)
        self.raw = RawSource(made)
        self._number = 0

    def _wrap(self, writer: PageWriter) -> PageWriter:
        self.switches.append(Switch(writer))
        return self.switches[-1]

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.made.receiver.book.counts)

    def request(self) -> Request:
        """A new one, with blocks and a ticket that is out."""
        ours, theirs = self.made.source.layout, self.made.target.layout
        num_tokens = self.dice.randint(1, MAX_TOKENS)
        first_block = self.dice.randrange(blocks_for(num_tokens, theirs.block_size))
        blocks = self.pool.allocate(blocks_for(num_tokens, theirs.block_size))
        self._number += 1
        claims = claims_for(
            f"r{self._number}",
            tuple(blocks),
            first_block,
            layout=theirs,
            num_tokens=num_tokens,
            data_rank=self.dice.randrange(theirs.data_parallel),
        )
        table = self.dice.sample(range(NUM_BLOCKS), blocks_for(num_tokens, ours.block_size))
        source = SequenceKV(ours, table, data_rank=self.dice.randrange(ours.data_parallel))
        self.made.receiver.expect(claims)
        return Request(claims, source, blocks)

    def sendables(self, request: Request, source: SequenceKV | None = None) -> list[Sendable]:
        """All its frames, in any order."""
        plan = plan_resharding(source or request.source, request.target, request.tokens)
        made = self.raw.frames_of(request.claims, plan)
        self.dice.shuffle(made)
        return made

    def is_served(self, request: Request) -> None:
        """It has arrived, and every byte is the right one; its blocks come back."""
        assert self.made.at_target.next() == HandoffComplete(request.claims.request_id, TOKEN)
        for part in plan_resharding(request.source, request.target, request.tokens).layers:
            there = self.made.sources[part.source_rank].layer(part.layer)
            here = self.made.targets[part.target_rank].layer(part.layer)
            for span in part.ranges:
                right = there[span.source_offset : span.source_offset + span.length]
                assert here[span.target_offset : span.target_offset + span.length] == right
        self.pool.release(request.blocks[::-1])

    def fails(self, request: Request) -> str:
        """The target will not decode from it; says why. Its blocks stay where they are."""
        failed = self.made.at_target.next()
        assert isinstance(failed, HandoffFailed), failed
        assert failed.request_id == request.claims.request_id
        return failed.code

    def comes_back(self, request: Request, stop: Callable[[], None]) -> None:
        """Its blocks are revoked; they are free only when its writer has stopped."""
        self.made.receiver.revoke(request.claims.request_id)
        stop()
        assert self.made.at_target.next() == WriterGone(request.claims.request_id)
        self.pool.release(request.blocks[::-1])

    def served_as_ever(self, raw: RawSource) -> None:
        """A connection, and the blocks, are as good as before."""
        request = self.request()
        raw.begin(request.claims)
        for sendable in self.sendables(request):
            raw.send(sendable)
        raw.close_handoff(request.claims)
        raw.hears(frames.Accepted)
        self.is_served(request)
