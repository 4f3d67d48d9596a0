"""What the next step of one worker computes: continuous batching, chunked prefill, preemption.

There are no phases, only one rule: every sequence's computed tokens catch up with its known tokens. A
sequence that decodes is one token behind, a prompt is many behind, and a preempted sequence starts over
with its whole log, outputs included.

Prompts go by turns, which are fair among tenants and the order of arrival within each (`policy.fair_turns`):

* Decodes go first, so a long prompt never stalls a running stream; prompts share what is left of the
  token budget, in order of their turns. `max_sequences < max_batch_tokens` guarantees that something is left.
* Up to half of that goes to prompts much shorter than what the first one still lacks. So they need not wait until
  a long one is done, which takes at most twice as long for it.
* While several tenants bring prompts, those that are not behind get half of a step at most, so that steps are short
  for whoever comes next. On one tenant's own nothing is kept back.
* A waiting sequence gets blocks for its whole log at once. So a prefill, once begun, never stops for lack
  of blocks, and two half-computed prompts cannot block each other. Only decodes grow later.
* It is admitted only if one block per running sequence stays free: they can all go on for a while without
  taking the newcomer's blocks away again. Nobody overtakes the first waiting sequence.

Blocks go by age, the order in which sequences came:

* A decode that finds no block takes those of the youngest sequence that is not pinned. So the oldest
  always gets on, and every sequence becomes the oldest in the end.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass

from diptych.core.blocks import BlockId, blocks_for, extend_block_hashes
from diptych.core.sequence import Batch, ScheduledSequence, Sequence, SequenceStatus
from diptych.policy.backlog import SHORT
from diptych.policy.block_pool import BlockPool, OutOfBlocks
from diptych.policy.fair_turns import FairTurns

CREDIT_STEPS = 2  # steps' worth of prompts that a tenant which stays below its share may bring at once


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of one step. `max_batch_tokens` bounds how long a step takes, and so what a decode
    feels of other sequences' prompts."""

    max_batch_tokens: int = 2048
    max_sequences: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.max_sequences < self.max_batch_tokens:
            raise ValueError(
                f"wanted 1 <= max_sequences < max_batch_tokens, got {self.max_sequences}, {self.max_batch_tokens}"
            )


class Scheduler:
    """Decides each step of one worker and keeps its sequences' block tables.

    Use: `schedule`, run the batch, `complete`, append the sampled tokens to their logs, again. A sequence
    must not be removed or detached while a batch that it is part of is being computed.

    Attributes:
        preempted: sequences whose KV the last `schedule` gave up. They wait, or (rarely) run again at once
            on blocks that they can share by now.
        starved: sequences that the last `schedule` dropped since their log outgrew the whole pool;
            their requests have to be failed.
        num_preemptions: since the start.
    """

    def __init__(self, pool: BlockPool, limits: BatchLimits) -> None:
        self.preempted: list[Sequence] = []
        self.starved: list[Sequence] = []
        self.num_preemptions = 0
        self._pool = pool
        self._limits = limits
        self._waiting: list[Sequence] = []  # in order of turn
        self._running: list[Sequence] = []  # oldest first
        self._age: dict[Sequence, int] = {}  # of the sequences in either list: less is older
        self._next_age = 0
        self._turns = FairTurns(CREDIT_STEPS * limits.max_batch_tokens)
        self._turn: dict[Sequence, tuple[float, int]] = {}  # of the same sequences; of equal turns the older is first
        self._admitted: set[Sequence] = set()  # have run before: their num_cached_tokens is settled

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that take part in steps, oldest first."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences that wait for blocks or for their turn, which is their order."""
        return tuple(self._waiting)

    @property
    def tokens_waiting(self) -> int:
        """Of the logs that wait for blocks or for their turn."""
        return sum(sequence.num_tokens for sequence in self._waiting)

    @property
    def prefill_tokens_queued(self) -> int:
        """Known tokens without KV, not counting the one that each decoding sequence is behind."""
        behind = [sequence.num_uncomputed_tokens for sequence in self._running]
        return self.tokens_waiting + sum(tokens for tokens in behind if tokens > 1)

    def fits(self, num_tokens: int) -> bool:
        """Whether a log of `num_tokens` tokens fits into this worker at all."""
        return blocks_for(num_tokens, self._pool.block_size) <= self._pool.num_blocks

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence without KV, as the youngest.

        Raises OutOfBlocks if it does not fit (`fits`) and so would wait for ever.
        """
        if not self.fits(sequence.num_tokens):
            raise OutOfBlocks(f"{sequence.num_tokens} tokens do not fit {self._pool.num_blocks} blocks")
        to_compute = sequence.num_tokens - len(self._cached(sequence)) * self._pool.block_size
        self._enrol(sequence, self._turns.turn(sequence.request, to_compute))
        sequence.status = SequenceStatus.WAITING
        self._wait(sequence)

    def join(self, sequence: Sequence) -> None:
        """Take in, as the youngest, a sequence whose KV is in place: its block table holds what is computed.

        It runs at once, even if more than `max_sequences` run then; the oldest of them take part in steps.
        """
        self._enrol(sequence, self._turns.start(sequence.request.tenant))
        self._admitted.add(sequence)
        sequence.status = SequenceStatus.RUNNING
        self._running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is over, and release its blocks. Harmless if repeated."""
        self._forget(sequence)
        self._release_blocks(sequence)
        sequence.status = SequenceStatus.FINISHED

    def detach(self, sequence: Sequence) -> list[BlockId]:
        """Forget a sequence but release nothing: the references of its blocks, returned, are now the caller's."""
        self._forget(sequence)
        sequence.status = SequenceStatus.HELD
        return list(sequence.block_table)

    def schedule(self) -> Batch | None:
        """The next step, or None if there is nothing to compute or no room to do it in."""
        self.preempted, self.starved = [], []
        taking_part = self._running[: self._limits.max_sequences]
        rows = [_share(sequence, 1) for sequence in taking_part if _decodes(sequence) and self._grow(sequence)]
        rows += self._schedule_prompts(taking_part, self._limits.max_batch_tokens - len(rows))
        return Batch(tuple(rows)) if rows else None

    def _schedule_prompts(self, taking_part: list[Sequence], budget: int) -> list[ScheduledSequence]:
        """Shares of `budget` tokens, in order of turns, for those that take part and those that wait."""
        running = sorted(filter(_prefills, taking_part), key=self._turn.__getitem__)
        left = deque(running)
        kept = budget // 2 if self._turns.are_shared else 0  # for tenants that are behind
        rows: list[ScheduledSequence] = []
        while budget > 0 and (sequence := self._next_prompt(left)) is not None:
            if any(row.sequence is sequence for row in rows):
                continue
            rest = budget if self._turns.is_behind(self._position(sequence)) else budget - kept
            if not rows and rest < sequence.num_uncomputed_tokens:
                rows = self._schedule_short(sequence, running, rest // 2)
                rest -= sum(row.num_tokens for row in rows)
                budget -= sum(row.num_tokens for row in rows)
            if rest > 0:
                rows.append(_share(sequence, rest))
                budget -= rows[-1].num_tokens
        return rows

    def _next_prompt(self, running: deque[Sequence]) -> Sequence | None:
        """Whose turn it is: the first of `running`, or of those that wait if that comes before and there is room."""
        if self._waiting and (not running or self._turn[self._waiting[0]] < self._turn[running[0]]):
            admitted = self._admit_first()
            if admitted is not None:
                return admitted
        return running.popleft() if running else None

    def _schedule_short(self, first: Sequence, running: list[Sequence], budget: int) -> list[ScheduledSequence]:
        """Shares of prompts that are short beside what `first` still lacks, those that come next in the queue
        included."""
        limit = first.num_uncomputed_tokens // SHORT
        rows: list[ScheduledSequence] = []
        for sequence in running:
            if budget > 0 and sequence is not first and sequence.num_uncomputed_tokens <= limit:
                rows.append(_share(sequence, budget))
                budget -= rows[-1].num_tokens
        while budget > 0 and self._waiting and self._waiting[0].num_tokens <= limit:
            admitted = self._admit_first()
            if admitted is None:
                break
            rows.append(_share(admitted, budget))
            budget -= rows[-1].num_tokens
        return rows

    def complete(self, batch: Batch) -> None:
        """The step is done: its KV is in place, and blocks that it filled may be shared from now on."""
        block_size = self._pool.block_size
        for row in batch.rows:
            sequence = row.sequence
            sequence.num_computed_tokens = row.end
            extend_block_hashes(sequence.block_hashes, sequence.token_ids, block_size, salt=sequence.request.cache_salt)
            for index in range(row.start // block_size, row.end // block_size):
                self._pool.register(sequence.block_table[index], sequence.block_hashes[index])
        self._count_turns(batch)

    def _grow(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the block that its newest token needs, if need be at the expense of
        the youngest. False if it cannot take part in this step."""
        missing = blocks_for(sequence.num_tokens, self._pool.block_size) - len(sequence.block_table)
        while missing > self._pool.num_free:
            victim = next((running for running in reversed(self._running) if not running.pinned), None)
            if victim is None or self._age[victim] < self._age[sequence]:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.block_table += self._pool.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait; what it had computed is computed again later."""
        self._running.remove(sequence)
        self._release_blocks(sequence)
        if not self.fits(sequence.num_tokens):
            self._forget(sequence)
            sequence.status = SequenceStatus.FINISHED
            self.starved.append(sequence)
            return
        sequence.status = SequenceStatus.WAITING
        self._wait(sequence)
        self.preempted.append(sequence)
        self.num_preemptions += 1

    def _admit_first(self) -> Sequence | None:
        """Let the first waiting sequence run, with blocks for its whole log; None if it has to wait on."""
        if len(self._running) >= self._limits.max_sequences:
            return None
        sequence, pool = self._waiting[0], self._pool
        cached = self._match(sequence)
        if cached is None:
            return None
        fresh = blocks_for(sequence.num_tokens, pool.block_size) - len(cached)
        headroom = len(self._running)
        if fresh + pool.count_cached(cached) + headroom > pool.num_free:
            return None
        pool.take_cached(cached)
        sequence.block_table = [*cached, *pool.allocate(fresh)]
        sequence.num_computed_tokens = len(cached) * pool.block_size
        if sequence not in self._admitted:
            self._admitted.add(sequence)
            sequence.num_cached_tokens = sequence.num_computed_tokens
        sequence.status = SequenceStatus.RUNNING
        del self._waiting[0]
        bisect.insort(self._running, sequence, key=self._age.__getitem__)
        return sequence

    def _match(self, sequence: Sequence) -> list[BlockId] | None:
        """The leading blocks that need not be computed (at least one token is left to compute).

        None if the next block after them is being computed by somebody else right now: a step later
        it can be shared, so of several requests with one prompt only the first computes it.
        """
        cached = self._cached(sequence)
        index = len(cached)
        missing = sequence.block_hashes[index : index + 1]
        if self._pool.prefix_caching and index < (sequence.num_tokens - 1) // self._pool.block_size:
            for other in self._running:
                unfinished = _prefills(other) and other.num_computed_tokens < (index + 1) * self._pool.block_size
                if unfinished and other.block_hashes[index : index + 1] == missing:
                    return None
        return cached

    def _cached(self, sequence: Sequence) -> list[BlockId]:
        """The leading blocks of its log that the cache has now, but for one token."""
        block_size = self._pool.block_size
        extend_block_hashes(sequence.block_hashes, sequence.token_ids, block_size, salt=sequence.request.cache_salt)
        return self._pool.match(sequence.block_hashes[: (sequence.num_tokens - 1) // block_size])

    def _count_turns(self, batch: Batch) -> None:
        """Tell the turns how far a step has brought the prompts."""
        computed = (row.sequence for row in batch.rows if row.num_tokens > 1)
        prompts = {*computed, *self._waiting, *filter(_prefills, self._running)}
        self._turns.reached(min(map(self._position, prompts), default=-math.inf))

    def _position(self, sequence: Sequence) -> float:
        """How far its tenant has come with it, in the time of turns."""
        return self._turn[sequence][0] - sequence.num_uncomputed_tokens / sequence.request.weight

    def _enrol(self, sequence: Sequence, turn: float) -> None:
        """It is the youngest."""
        self._next_age += 1
        self._age[sequence] = self._next_age
        self._turn[sequence] = turn, self._next_age

    def _wait(self, sequence: Sequence) -> None:
        bisect.insort(self._waiting, sequence, key=self._turn.__getitem__)

    def _forget(self, sequence: Sequence) -> None:
        if self._age.pop(sequence, None) is None:
            return
        del self._turn[sequence]
        self._admitted.discard(sequence)
        for sequences in (self._running, self._waiting):
            if sequence in sequences:
                sequences.remove(sequence)

    def _release_blocks(self, sequence: Sequence) -> None:
        self._pool.release(reversed(sequence.block_table))
        sequence.block_table = []
        sequence.num_computed_tokens = 0


def _decodes(sequence: Sequence) -> bool:
    """Runs (has not just been preempted) and is one token behind."""
    return sequence.status is SequenceStatus.RUNNING and sequence.num_uncomputed_tokens == 1


def _prefills(sequence: Sequence) -> bool:
    """Runs (has not just been preempted) and is several tokens behind."""
    return sequence.status is SequenceStatus.RUNNING and sequence.num_uncomputed_tokens > 1


def _share(sequence: Sequence, budget: int) -> ScheduledSequence:
    """What a sequence computes in a step that has room for `budget` more tokens."""
    start = sequence.num_computed_tokens
    end = min(sequence.num_tokens, start + budget)
    return ScheduledSequence(sequence, start, end - start, samples=end == sequence.num_tokens)
