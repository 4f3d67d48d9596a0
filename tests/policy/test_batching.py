"""The scheduler, driving the scripted engine: whatever it decides, every token must be right."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduled_server import BLOCK_SIZE, Server

from diptych.core.blocks import blocks_for
from diptych.core.request import Request
from diptych.core.sequence import Batch, ScheduledSequence, Sequence, SequenceStatus
from diptych.policy.batching import BatchLimits
from diptych.policy.block_pool import OutOfBlocks

limits = st.builds(BatchLimits, max_batch_tokens=st.integers(5, 24), max_sequences=st.integers(1, 4))
prompts = st.builds(
    lambda shared, tail, count: [shared] * count + tail,
    shared=st.sampled_from([65, 66]),
    tail=st.lists(st.integers(32, 40), min_size=1, max_size=12),
    count=st.sampled_from([0, 4, 9]),
)


class ServerMachine(RuleBasedStateMachine):
    """Random arrivals, hand-offs and aborts on a pool that is too small for them."""

    @initialize(num_blocks=st.integers(6, 14), limits=limits, prefix_caching=st.booleans())
    def start(self, num_blocks: int, limits: BatchLimits, prefix_caching: bool) -> None:
        self.server = Server(num_blocks, limits, prefix_caching=prefix_caching)
        self.live: list[Sequence] = []

    @rule(prompt=prompts, max_tokens=st.integers(1, 30), seed=st.integers(0, 2), tenant=st.sampled_from("aab"))
    def arrive(self, prompt: list[int], max_tokens: int, seed: int, tenant: str) -> None:
        if self.server.scheduler.fits(len(prompt) + 1):
            self.live.append(self.server.add(prompt, max_tokens, seed, tenant))

    @rule(prompt=prompts, max_tokens=st.integers(2, 30))
    def take_over(self, prompt: list[int], max_tokens: int) -> None:
        if blocks_for(len(prompt), BLOCK_SIZE) <= self.server.pool.num_free and self.server.scheduler.fits(
            len(prompt) + 1
        ):
            self.live.append(self.server.join(prompt, max_tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        self.server.scheduler.remove(sequence)

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.server.step()

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "server"):
            self.server.check_books()

    def teardown(self) -> None:
        if hasattr(self, "server"):
            self.server.run()


TestServerMachine = ServerMachine.TestCase
TestServerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def server(num_blocks: int = 64, tokens: int = 32, sequences: int = 8, prefix_caching: bool = True) -> Server:
    limits = BatchLimits(max_batch_tokens=tokens, max_sequences=sequences)
    return Server(num_blocks, limits, prefix_caching=prefix_caching)


def shares(batch: Batch | None) -> list[tuple[str, int, int]]:
    assert batch is not None
    return [(row.sequence.request_id, row.start, row.num_tokens) for row in batch.rows]


def test_prompts_share_the_budget_and_decodes_come_first() -> None:
    worker = server(tokens=10)
    worker.add(list(range(40, 46)), 9)
    worker.add(list(range(50, 58)), 9)
    assert shares(worker.step()) == [("r0", 0, 6), ("r1", 0, 4)]
    assert shares(worker.step()) == [("r0", 6, 1), ("r1", 4, 4)]
    worker.add(list(range(60, 80)), 9)
    assert shares(worker.step()) == [("r0", 7, 1), ("r1", 8, 1), ("r2", 0, 8)]
    worker.run()


def test_short_prompts_need_not_wait_for_a_long_one() -> None:
    worker = server(num_blocks=40, tokens=9, sequences=4)
    worker.add(list(range(40, 100)), 1)
    assert shares(worker.step()) == [("r0", 0, 9)]
    worker.add([65] * 12, 1)
    worker.add([66] * 3, 1)
    assert shares(worker.step()) == [("r1", 0, 4), ("r0", 9, 5)]  # half of the step, in order of arrival
    assert shares(worker.step()) == [("r1", 4, 4), ("r0", 14, 5)]
    assert shares(worker.step()) == [("r1", 8, 4), ("r0", 19, 5)]
    assert shares(worker.step()) == [("r2", 0, 3), ("r0", 24, 6)]
    worker.add([67] * 8, 1)  # more than a quarter of the 30 tokens that the oldest lacks
    assert shares(worker.step()) == [("r0", 30, 9)]
    worker.run()


@pytest.mark.fault(56)
def test_who_brings_little_goes_before_a_flood_and_steps_are_short_for_it() -> None:
    worker = server(num_blocks=80, tokens=24, sequences=6)
    worker.add(list(range(40, 200)), 1, tenant="flood")
    worker.add(list(range(140, 200)), 1, tenant="flood")
    for _ in range(3):
        assert worker.step().num_tokens == 24  # type: ignore[union-attr]
    worker.add([65] * 20, 1, tenant="victim")
    worker.add([66] * 6, 1, tenant="victim")
    assert shares(worker.step()) == [("r2", 0, 20), ("r3", 0, 4)]
    assert shares(worker.step()) == [("r3", 4, 2), ("r0", 72, 10)]  # and no more than half of the step
    assert shares(worker.step()) == [("r0", 82, 12)]
    worker.run()
    assert [sequence.request_id for sequence in worker.finished] == ["r2", "r3", "r0", "r1"]


@pytest.mark.fault(56)
def test_a_long_prompt_gets_on_beside_others_that_never_end() -> None:
    worker = server(num_blocks=60, tokens=8, sequences=4)
    long = worker.add(list(range(40, 100)), 1, tenant="long")
    for step in range(200):
        for tenant in ("one", "two"):
            if sum(waiting.request.tenant == tenant for waiting in worker.scheduler.waiting) < 2:
                worker.add([66 + step % 20] * 5, 1, tenant=tenant)
        worker.step()
    assert long in worker.finished


def test_what_is_cached_does_not_count_against_its_tenant() -> None:
    worker = server(num_blocks=80, tokens=8, sequences=4)
    known = list(range(40, 120))
    worker.add(known, 1, tenant="chat")
    worker.run()
    worker.add(list(range(80, 120)), 1, tenant="flood")
    worker.step()
    worker.add([*known, 1, 2, 3], 1, tenant="chat")
    assert shares(worker.step())[0] == ("r2", 80, 3)


@pytest.mark.fault(56)
def test_credit_is_bounded_however_long_others_have_been_there() -> None:
    worker = server(num_blocks=200, tokens=24, sequences=4)
    for number in range(10):
        worker.add([30 + number] * 40, 1, tenant="flood")
    worker.step_until(lambda: len(worker.finished) == 7)
    newcomer = worker.add(list(range(100, 200)), 1, tenant="newcomer")
    worker.step_until(lambda: newcomer in worker.finished)
    assert [sequence.request_id for sequence in worker.finished][:8] == [f"r{number}" for number in range(8)]


def test_preempted_sequence_recomputes_its_log_in_chunks() -> None:
    worker = server(num_blocks=6, tokens=5, sequences=2, prefix_caching=False)
    older = worker.add([65, 66, 67], 15)
    younger = worker.add([70, 71, 72], 15)
    worker.step_until(lambda: worker.scheduler.num_preemptions > 0)
    assert worker.scheduler.preempted == [younger]
    assert (younger.status, younger.num_computed_tokens, younger.block_table) == (SequenceStatus.WAITING, 0, [])
    worker.run()
    assert worker.finished == [older, younger]
    assert worker.scheduler.num_preemptions == 1


def test_preempted_sequence_finds_its_own_blocks_again() -> None:
    worker = server(num_blocks=6, sequences=2)
    worker.add([65, 66, 67], 13)
    younger = worker.add([70, 71, 72], 16)
    worker.step_until(lambda: younger in worker.scheduler.preempted)
    worker.step_until(lambda: younger.status is SequenceStatus.RUNNING)
    assert younger.num_computed_tokens >= BLOCK_SIZE
    assert younger.num_cached_tokens == 0, "fixed at the first admission"
    worker.run()


def test_preempted_twin_may_come_back_at_once_and_share() -> None:
    """Two equal logs were filled side by side; given up, one of them fits into the blocks of the other."""
    worker = server(num_blocks=9, tokens=5, sequences=2)
    prompt = [65] * 9 + [32]
    older = worker.join(prompt, 20)
    twin = worker.add(prompt, 18)
    worker.step_until(lambda: worker.scheduler.num_preemptions > 0)
    assert worker.scheduler.running == (older, twin)
    assert set(twin.block_table) & set(older.block_table)
    worker.run()


def test_no_ping_pong_between_preemption_and_admission() -> None:
    worker = server(num_blocks=8, sequences=4, prefix_caching=False)
    for first in range(40, 100, 15):
        worker.add(list(range(first, first + 6)), 20)
    worker.run()
    assert worker.scheduler.num_preemptions <= 4


def test_newcomer_leaves_room_for_running_sequences() -> None:
    worker = server(num_blocks=4)
    worker.add([65] * 7, 5)
    worker.step()
    worker.add([66] * 8, 1)
    batch = worker.step()
    assert shares(batch) == [("r0", 7, 1)]
    assert worker.pool.num_free == 2
    worker.run()


def test_cached_prompt_leaves_one_token_to_compute() -> None:
    worker = server()
    prompt = list(range(40, 48))
    worker.add(prompt, 1)
    worker.run()
    again = worker.add(prompt, 1)
    assert shares(worker.step()) == [("r1", 4, 4)]
    assert again.num_cached_tokens == 4
    longer = worker.add([*prompt, 99], 1)
    assert shares(worker.step()) == [("r2", 8, 1)]
    assert longer.num_cached_tokens == 8
    worker.run()


def test_follow_up_finds_blocks_that_were_filled_token_by_token() -> None:
    worker = server(tokens=9)
    first = worker.add(list(range(40, 50)), 7)
    worker.run()
    follow_up = worker.add([*first.token_ids, 99], 1)
    worker.run()
    assert follow_up.num_cached_tokens == 16


def test_of_a_finished_sequence_the_tail_is_evicted_first() -> None:
    worker = server(num_blocks=4)
    prompt = list(range(40, 53))
    worker.add(prompt, 1)
    worker.run()
    worker.add([66] * 6, 1)
    worker.run()
    again = worker.add(prompt, 1)
    worker.run()
    assert again.num_cached_tokens == 8


def test_sequences_that_join_far_behind_share_the_budget() -> None:
    """Some of their KV exists, say from a transfer that was cut short."""
    worker = server(tokens=6, sequences=4)
    for first in (65, 66):
        sequence = worker.sequence([first] * 12, 2)
        sequence.block_table = worker.pool.allocate(3)
        worker.engine.step(Batch((ScheduledSequence(sequence, 0, 5, samples=False),)))
        sequence.num_computed_tokens = 5
        worker.scheduler.join(sequence)
    assert shares(worker.step()) == [("r0", 5, 6)]
    assert shares(worker.step()) == [("r0", 11, 1), ("r1", 5, 5)]
    worker.run()


def test_salt_separates_prefixes() -> None:
    worker = server()
    prompt = list(range(40, 49))
    worker.add(prompt, 1)
    worker.run()
    salted = Sequence.from_log(Request(request_id="salted", prompt_token_ids=tuple(prompt), cache_salt="tenant"))
    worker.age[salted] = 1
    worker.scheduler.add(salted)
    worker.step()
    assert salted.num_cached_tokens == 0


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_equal_prompts_that_arrive_together_are_computed_once(prefix_caching: bool) -> None:
    worker = server(tokens=64, prefix_caching=prefix_caching)
    prompt = list(range(40, 56))
    for seed in range(1, 5):
        worker.add(prompt, 3, seed)
    worker.run()
    cached = [sequence.num_cached_tokens for sequence in worker.finished]
    assert cached == ([0, 12, 12, 12] if prefix_caching else [0, 0, 0, 0])


def test_long_prompt_is_not_starved_by_a_flood_of_short_ones() -> None:
    worker = server(num_blocks=16, tokens=8, sequences=3)
    for first in range(40, 48):
        worker.add([first] * 3, 6)
    long = worker.add([65] * 40, 2)
    for step in range(60):
        worker.add([66 + step % 20] * 3, 6)
        worker.step()
    assert long in worker.finished
    worker.run()


def test_sequence_that_outgrows_the_pool_is_reported_and_dropped() -> None:
    worker = server(num_blocks=3)
    sequence = worker.add([65] * 8, 100)
    waiting = worker.add([66] * 8, 2)
    worker.run()
    assert worker.starved == [sequence]
    assert sequence.num_tokens == 3 * BLOCK_SIZE + 1
    assert worker.finished == [waiting]
    worker.scheduler.remove(sequence)
    worker.check_books()


def test_what_never_fits_is_refused() -> None:
    worker = server(num_blocks=3)
    assert worker.scheduler.fits(12)
    assert not worker.scheduler.fits(13)
    with pytest.raises(OutOfBlocks, match="13 tokens do not fit 3 blocks"):
        worker.add([65] * 13, 1)


def test_lone_sequence_waits_for_blocks_that_others_hold() -> None:
    """Blocks may be with hand-offs, out of the scheduler's sight: that is no reason to fail."""
    worker = server(num_blocks=4)
    elsewhere = worker.pool.allocate(2)
    sequence = worker.add([65] * 8, 4)
    worker.step()
    assert worker.step() is None
    assert worker.scheduler.preempted == [sequence]
    assert worker.step() is None
    worker.pool.release(elsewhere)
    worker.run()
    assert worker.finished == [sequence]


def test_pinned_sequence_keeps_its_blocks() -> None:
    worker = server(num_blocks=8)
    older = worker.add([65] * 4, 12)
    middle = worker.add([70] * 4, 12)
    worker.step()
    pinned = worker.join([66] * 15, 9)
    pinned.pinned = True
    worker.step_until(lambda: bool(worker.scheduler.preempted))
    assert worker.scheduler.preempted == [middle]
    assert worker.scheduler.running == (older, pinned)
    worker.run()
    assert worker.finished == [pinned, older, middle]


def test_detached_blocks_are_the_callers() -> None:
    worker = server()
    sequence = worker.add([65] * 8, 4)
    worker.step()
    blocks = worker.scheduler.detach(sequence)
    assert blocks == sequence.block_table
    assert sequence.status is SequenceStatus.HELD
    assert worker.scheduler.running == ()
    worker.pool.check_integrity({"hand-off": blocks})
    worker.pool.release(reversed(blocks))
    worker.run()


def test_joined_sequences_beyond_the_limit_take_turns_by_age() -> None:
    worker = server(tokens=4, sequences=2)
    joined = [worker.join([first], 3) for first in (65, 66, 67)]
    assert shares(worker.step()) == [("r0", 1, 1), ("r1", 1, 1)]
    worker.run()
    assert worker.finished == joined


def test_queued_prefill_tokens() -> None:
    worker = server(tokens=6, sequences=2)
    for first in (65, 66, 67):
        worker.add([first] * 5, 4)
    assert worker.scheduler.prefill_tokens_queued == 15
    worker.step()
    assert worker.scheduler.prefill_tokens_queued == 9
    worker.run()
    assert worker.scheduler.prefill_tokens_queued == 0


@pytest.mark.parametrize("values", [(8, 8), (8, 0), (0, 1)])
def test_limits_that_would_starve_prefills_are_refused(values: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="max_sequences < max_batch_tokens"):
        BatchLimits(*values)
