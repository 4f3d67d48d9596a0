"""A scheduler, its pool and the scripted engine in the loop that a worker runs, for the scheduler's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from diptych.core.blocks import blocks_for
from diptych.core.kv_layout import PrivateMemory
from diptych.core.request import Request, SamplingParams
from diptych.core.sequence import Batch, ScheduledSequence, Sequence, SequenceStatus
from diptych.engine.scripted import ScriptedEngine, ScriptedModel, expected_tokens
from diptych.policy.batching import BatchLimits, Scheduler
from diptych.policy.block_pool import BlockPool
from diptych.policy.stopping import finish_reason

BLOCK_SIZE = 4


class Server:
    """Pool, scheduler and engine in the loop that a worker runs, checking the scheduler's promises."""

    def __init__(self, num_blocks: int, limits: BatchLimits, *, prefix_caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, prefix_caching=prefix_caching)
        self.scheduler = Scheduler(self.pool, limits)
        self.limits = limits
        self.engine = ScriptedEngine(ScriptedModel(block_size=BLOCK_SIZE))
        self.engine.allocate_kv(num_blocks, PrivateMemory)
        self.age: dict[Sequence, int] = {}
        self.finished: list[Sequence] = []
        self.starved: list[Sequence] = []

    def sequence(self, prompt: list[int], max_tokens: int, seed: int = 0, tenant: str = "") -> Sequence:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0 if seed == 0 else 1.0, seed=seed)
        number = len(self.age)
        self.age[
            sequence := Sequence.from_log(
                Request(request_id=f"r{number}", prompt_token_ids=tuple(prompt), sampling=sampling, tenant=tenant)
            )
        ] = number
        return sequence

    def add(self, prompt: list[int], max_tokens: int, seed: int = 0, tenant: str = "") -> Sequence:
        sequence = self.sequence(prompt, max_tokens, seed, tenant)
        self.scheduler.add(sequence)
        return sequence

    def join(self, prompt: list[int], max_tokens: int) -> Sequence:
        """As after a hand-off: somebody else has computed the KV and the first token."""
        sequence = self.sequence(prompt, max_tokens)
        sequence.block_table = self.pool.allocate(blocks_for(len(prompt), BLOCK_SIZE))
        [token] = self.engine.step(Batch((ScheduledSequence(sequence, 0, len(prompt), samples=True),)))
        assert token is not None
        sequence.num_computed_tokens = len(prompt)
        sequence.token_ids.append(token.token_id)
        self.scheduler.join(sequence)
        return sequence

    def step(self) -> Batch | None:
        was_waiting = set(self.scheduler.waiting)
        batch = self.scheduler.schedule()
        self.starved += self.scheduler.starved
        self.check_order(was_waiting)
        if batch is None:
            return None
        self.check_batch(batch, was_waiting)
        tokens = self.engine.step(batch)
        self.scheduler.complete(batch)
        for row, token in zip(batch.rows, tokens, strict=True):
            assert (token is not None) == row.samples
            if token is None:
                continue
            row.sequence.token_ids.append(token.token_id)
            if finish_reason(row.sequence, self.engine.model.eos_token_ids) is not None:
                self.scheduler.remove(row.sequence)
                self.finished.append(row.sequence)
        return batch

    def check_order(self, was_waiting: set[Sequence]) -> None:
        """Nobody of one's own tenant overtakes, and it is the youngest who give way."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        admitted = [sequence for sequence in running if sequence in was_waiting]
        for tenant in {sequence.request.tenant for sequence in self.age}:
            queue = [self.age[other] for other in waiting if other.request.tenant == tenant]
            assert queue == sorted(queue)
            before = [self.age[sequence] for sequence in admitted if sequence.request.tenant == tenant]
            assert not before or not queue or max(before) < queue[0]
        preempted = self.scheduler.preempted
        newly_there = {*preempted, *was_waiting}
        kept = [sequence for sequence in running if not sequence.pinned and sequence not in newly_there]
        assert all(self.age[sequence] > self.age[other] for sequence in preempted for other in kept)
        assert list(running) == sorted(running, key=self.age.__getitem__)
        for sequence in self.scheduler.starved:
            assert not self.scheduler.fits(sequence.num_tokens)

    def check_batch(self, batch: Batch, was_waiting: set[Sequence]) -> None:
        assert 0 < batch.num_tokens <= self.limits.max_batch_tokens
        assert len(batch.rows) <= self.limits.max_sequences
        taking_part = [row.sequence for row in batch.rows]
        assert len(set(taking_part)) == len(taking_part)
        for row in batch.rows:
            assert row.sequence.status is SequenceStatus.RUNNING
            assert row.start == row.sequence.num_computed_tokens
            assert row.num_tokens > 0
            assert row.samples == (row.end == row.sequence.num_tokens)
        due = self.scheduler.running[: self.limits.max_sequences]
        decodes = {sequence for sequence in due if sequence.num_uncomputed_tokens == 1 and not sequence.pinned}
        assert decodes - was_waiting <= set(taking_part), "a decode was left out"
        prefills = {sequence for sequence in due if sequence.num_uncomputed_tokens > 1}
        assert not prefills or prefills & set(taking_part), "prefills were left out"

    def check_books(self) -> None:
        live = (*self.scheduler.running, *self.scheduler.waiting)
        self.pool.check_integrity({sequence.request_id: sequence.block_table for sequence in live})
        assert not any(sequence.block_table for sequence in self.scheduler.waiting)

    def step_until(self, reached: Callable[[], bool], max_steps: int = 1000) -> None:
        """Fails if that never comes."""
        for _ in range(max_steps):
            if reached():
                return
            self.step()
            self.check_books()
        pytest.fail(f"not reached in {max_steps} steps")

    def run(self) -> None:
        """Until nothing is left, and all of it was right."""
        self.step_until(lambda: not self.scheduler.running and not self.scheduler.waiting)
        assert self.pool.num_used == 0
        for sequence in self.finished:
            assert sequence.output_token_ids == expected(sequence)
        for sequence in self.starved:
            outputs = sequence.output_token_ids
            assert outputs == expected(sequence)[: len(outputs)]


def expected(sequence: Sequence) -> list[int]:
    request = sequence.request
    return expected_tokens(request.prompt_token_ids, request.sampling.max_tokens, request.sampling)
