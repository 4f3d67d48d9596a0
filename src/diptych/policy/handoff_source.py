"""The source side's story: prefill a sequence for somebody else.

    1. open      a prefill request arrives with a ticket for blocks on the target
    2. pushes    each scheduled share says which tokens' KV leaves: cached ones' at once, the share's own
                 layer by layer while the step runs
    3. offer     the last share is computed; the first token closes the hand-off
    4. accepted  the target has verified everything; only now are the blocks given back

Whatever goes wrong in between, the blocks stay until the sender has said that it is done reading.

The two workers may be cut into ranks differently and have blocks of different sizes. What leaves are exactly
the tokens that the target lacks, in pieces that end where a block ends on both sides (but for the last one).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diptych.core.actions import AbandonPush, CloseHandoff, PushPages, SendFailure, WorkerAction
from diptych.core.blocks import BlockId, blocks_for
from diptych.core.kv_layout import KVLayout, SequenceKV
from diptych.core.request import SampledToken
from diptych.core.sequence import ScheduledSequence, Sequence, SequenceStatus
from diptych.core.ticket import TicketClaims
from diptych.policy.batching import Scheduler
from diptych.policy.block_pool import BlockPool
from diptych.policy.handoff import Effect, Side, SourceEvent, SourceState, source_side
from diptych.policy.resharding import incompatibilities, plan_resharding


@dataclass(slots=True)
class _Source:
    sequence: Sequence
    claims: TicketClaims
    side: Side[SourceState, SourceEvent]
    next_token: int  # the first one whose KV is not yet pushed
    blocks: list[BlockId] | None = None  # held here once the scheduler has let go


class SourceHandoffs:
    """All hand-offs that this worker is the source of."""

    def __init__(self, layout: KVLayout, pool: BlockPool, scheduler: Scheduler) -> None:
        self._layout = layout
        self._pool = pool
        self._scheduler = scheduler
        self._open: dict[str, _Source] = {}
        self.failed = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def blocks_held(self) -> dict[str, list[BlockId]]:
        """Blocks referenced by hand-offs alone, by request (for the integrity check)."""
        return {request_id: source.blocks for request_id, source in self._open.items() if source.blocks is not None}

    def refusal(self, sequence: Sequence, claims: TicketClaims) -> str | None:
        """Why this ticket cannot be served, or None if it can."""
        if reasons := incompatibilities(self._layout, claims.layout):
            return f"ticket is for another KV layout: {'; '.join(reasons)}"
        if claims.request_id != sequence.request_id or claims.num_tokens != sequence.num_tokens:
            return "ticket was granted for another request"
        size, wanted = claims.layout.block_size, claims.num_tokens
        if len(claims.blocks) != blocks_for(wanted, size) or not 0 <= claims.first_block * size < wanted:
            return f"ticket names {len(claims.blocks)} blocks, from {claims.first_block} on, for {wanted} tokens"
        if not 0 <= claims.data_rank < claims.layout.data_parallel:
            return f"ticket is for data-parallel rank {claims.data_rank} of {claims.layout.data_parallel}"
        return None

    def open(self, sequence: Sequence, claims: TicketClaims) -> None:
        """Begin; the sequence is about to be scheduled."""
        sequence.pinned = True
        first_token = claims.first_block * claims.layout.block_size
        self._open[sequence.request_id] = _Source(sequence, claims, source_side(), first_token)
        self._scheduler.add(sequence)

    def pushes(self, row: ScheduledSequence) -> tuple[PushPages | None, PushPages | None]:
        """Pages that leave because of this share: (ready before the step, made by the step)."""
        source = self._open.get(row.sequence.request_id)
        if source is None:
            return None, None
        whole = math.lcm(self._layout.block_size, source.claims.layout.block_size)
        ready = self._push_up_to(source, row.start - row.start % whole)
        end = row.end if row.samples else row.end - row.end % whole
        return ready, self._push_up_to(source, end)

    def _push_up_to(self, source: _Source, end: int) -> PushPages | None:
        tokens = range(source.next_token, end)
        if not tokens:
            return None
        source.next_token = end
        sequence, claims = source.sequence, source.claims
        plan = plan_resharding(
            SequenceKV(self._layout, sequence.block_table, data_rank=sequence.data_rank),
            SequenceKV(claims.layout, claims.blocks, data_rank=claims.data_rank),
            tokens,
        )
        return PushPages(sequence.request_id, claims, plan)

    def offer(self, request_id: str, token: SampledToken) -> list[WorkerAction]:
        """The prompt is computed and `token` sampled: close the hand-off and leave the batch."""
        source = self._open[request_id]
        source.side.on(SourceEvent.ALL_PUSHED)
        self._detach(source)
        return [CloseHandoff(request_id, source.claims, token)]

    def on(self, request_id: str, event: SourceEvent, code: str = "", message: str = "") -> list[WorkerAction]:
        """Something happened to the hand-off. Unknown, late and duplicate events change nothing."""
        source = self._open.get(request_id)
        if source is None:
            return []
        actions: list[WorkerAction] = []
        for effect in source.side.on(event):
            if effect is Effect.REPORT_FAILURE:
                self.failed += 1
                actions.append(SendFailure(request_id, code, message))
            elif effect is Effect.STOP_WRITING:
                self._detach(source)
                actions.append(AbandonPush(request_id, source.claims))
            elif effect is Effect.RELEASE_BLOCKS:
                self._pool.release(reversed(source.blocks or []))
                del self._open[request_id]
        return actions

    def _detach(self, source: _Source) -> None:
        if source.blocks is None:
            source.blocks = self._scheduler.detach(source.sequence)
            source.sequence.status = SequenceStatus.HELD
