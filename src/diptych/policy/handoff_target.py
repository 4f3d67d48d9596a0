"""The target side's story: take over a sequence that somebody else prefills.

1. reserve   blocks for the whole log, before anybody does any work (this is the back-pressure);
             what the prefix cache already holds is kept and will not be sent
2. grant     a ticket for the missing blocks goes to the router, and from there to the source
3. complete  every page has arrived and is verified: the first token joins the log, the sequence
             joins the batch, and the hand-off is over
-. revoke    aborted, failed or overdue: nothing more is accepted, and the blocks stay in
             quarantine until nobody can write to them any more
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from diptych.core.actions import GrantTicket, RevokeTicket, SendFailure, WorkerAction
from diptych.core.blocks import BlockId, blocks_for, extend_block_hashes
from diptych.core.request import SampledToken
from diptych.core.sequence import Sequence, SequenceStatus
from diptych.policy.batching import Scheduler
from diptych.policy.block_pool import BlockPool
from diptych.policy.handoff import Effect, Side, TargetEvent, TargetState, target_side


@dataclass(slots=True)
class _Target:
    sequence: Sequence
    side: Side[TargetState, TargetEvent]
    deadline: float


class TargetHandoffs:
    """All hand-offs that this worker is the target of, and the queue of those that wait for room."""

    def __init__(self, pool: BlockPool, scheduler: Scheduler, *, max_sequences: int, timeout: float) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self._max_sequences = max_sequences
        self._timeout = timeout
        self._waiting: deque[Sequence] = deque()
        self._open: dict[str, _Target] = {}
        self.failed = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def tokens_waiting(self) -> int:
        """Of the logs that wait for room."""
        return sum(sequence.num_tokens for sequence in self._waiting)

    def blocks_held(self) -> dict[str, list[BlockId]]:
        """Blocks referenced by hand-offs alone, by request (for the integrity check)."""
        return {request_id: target.sequence.block_table for request_id, target in self._open.items()}

    def reserve(self, sequence: Sequence) -> None:
        """Queue for room. First come, first served."""
        self._waiting.append(sequence)

    def withdraw(self, request_id: str) -> bool:
        """Leave the queue; False if it is not there."""
        for sequence in self._waiting:
            if sequence.request_id == request_id:
                self._waiting.remove(sequence)
                return True
        return False

    def grant(self, now: float) -> list[WorkerAction]:
        """Grant tickets from the head of the queue for as long as there is room."""
        actions: list[WorkerAction] = []
        while self._waiting and self._has_room(self._waiting[0]):
            actions.append(self._grant(self._waiting.popleft(), now))
        return actions

    def _has_room(self, sequence: Sequence) -> bool:
        """Room for the whole log and, unless the worker is empty, one block for each running sequence
        to grow into and enough for the local prompt whose turn it is: else the newcomer causes a preemption.

        Cached blocks are counted as needed too, since reviving them takes them from the free ones."""
        scheduler, pool = self._scheduler, self._pool
        if len(self._open) + len(scheduler.running) >= self._max_sequences:
            return False
        headroom = len(scheduler.running)
        if scheduler.waiting:
            headroom += blocks_for(scheduler.waiting[0].num_tokens, pool.block_size)
        return blocks_for(sequence.num_tokens, pool.block_size) + headroom <= pool.num_free

    def _cached(self, sequence: Sequence) -> list[BlockId]:
        """Leading blocks that are here already; the last token's block is always sent."""
        block_size = self._pool.block_size
        extend_block_hashes(sequence.block_hashes, sequence.token_ids, block_size, sequence.request.cache_salt)
        return self._pool.match(sequence.block_hashes[: (sequence.num_tokens - 1) // block_size])

    def _grant(self, sequence: Sequence, now: float) -> GrantTicket:
        block_size = self._pool.block_size
        cached = self._cached(sequence)
        self._pool.take_cached(cached)
        fresh = self._pool.allocate(blocks_for(sequence.num_tokens, block_size) - len(cached))
        sequence.block_table = [*cached, *fresh]
        sequence.num_cached_tokens = len(cached) * block_size
        sequence.status = SequenceStatus.RECEIVING
        self._open[sequence.request_id] = _Target(sequence, target_side(), now + self._timeout)
        return GrantTicket(
            request=sequence.request,
            blocks=tuple(sequence.block_table),
            first_block=len(cached),
            num_tokens=sequence.num_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            data_rank=sequence.data_rank,
        )

    def overdue(self, now: float) -> list[str]:
        """Requests whose pages should have been here by now."""
        return [
            request_id
            for request_id, target in self._open.items()
            if target.side.state is TargetState.RESERVED and target.deadline <= now
        ]

    def complete(self, request_id: str, token: SampledToken) -> Sequence | None:
        """All pages are verified. Returns the sequence, now in the batch; None if it came too late."""
        target = self._open.get(request_id)
        if target is None or Effect.JOIN_BATCH not in target.side.on(TargetEvent.COMPLETE):
            return None
        del self._open[request_id]
        sequence = target.sequence
        sequence.num_computed_tokens = sequence.num_tokens
        for block, block_hash in zip(sequence.block_table, sequence.block_hashes, strict=False):
            self._pool.register(block, block_hash)
        sequence.token_ids.append(token.token_id)
        self._scheduler.join(sequence)
        return sequence

    def on(self, request_id: str, event: TargetEvent, code: str = "", message: str = "") -> list[WorkerAction]:
        """Something else happened. Unknown, late and duplicate events change nothing."""
        target = self._open.get(request_id)
        if target is None:
            return []
        actions: list[WorkerAction] = []
        for effect in target.side.on(event):
            if effect is Effect.REPORT_FAILURE:
                self.failed += 1
                actions.append(SendFailure(request_id, code, message))
            elif effect is Effect.REVOKE_TICKET:
                actions.append(RevokeTicket(request_id))
            elif effect is Effect.RELEASE_BLOCKS:
                self._pool.release(reversed(target.sequence.block_table))
                del self._open[request_id]
        return actions
