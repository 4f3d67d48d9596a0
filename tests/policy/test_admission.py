"""Who comes in, who is told to come back and when, and who may start."""

from __future__ import annotations

from typing import Any

import pytest

from diptych.core.errors import OverloadedError
from diptych.core.fleet import Role, Route, WorkerState, WorkerStats, WorkerView
from diptych.core.request import Request, SamplingParams
from diptych.policy.admission import JITTER, Admission, AdmissionLimits, TenantLimits
from diptych.policy.backlog import Prompt
from diptych.policy.saturation import Pending, Room, RoomLimits

RATE = 1000.0
ROOM = RoomLimits(backlog_seconds=1.0, backlog_tokens=500)


def view(name: str = "w", role: Role = Role.MIXED, state: WorkerState = WorkerState.READY, **stats: Any) -> WorkerView:
    stats = {"prefill_rate": RATE} | stats
    return WorkerView(
        worker_id=name, role=role, state=state, epoch=1, num_blocks=100, block_size=10, stats=WorkerStats(**stats)
    )


def room(*pending: Pending, **stats: Any) -> Room:
    return Room([view(**stats)], pending, ROOM)


def request(name: str, tenant: str = "", prompt: int = 10, max_tokens: int = 10) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(request_id=name, prompt_token_ids=(1,) * prompt, sampling=sampling, tenant=tenant)


def admission(**limits: Any) -> Admission:
    return Admission(AdmissionLimits(**limits))


def refused(books: Admission, tenant: str = "", patience: float | None = None, prompt: int = 10) -> OverloadedError:
    error = books.refusal(tenant, prompt, patience, room())
    assert error is not None
    return error


def test_the_router_serves_so_many_requests_and_no_more() -> None:
    books = admission(max_requests=2)
    for name in "ab":
        assert books.refusal("", 10, None, room()) is None
        books.enter(request(name), 0.0)
    error = refused(books)
    assert (error.status, error.code) == (429, "queue_full")
    books.leave(request("a"))
    assert books.refusal("", 10, None, room()) is None
    books.enter(request("c"), 0.0)
    assert refused(books).code == "queue_full"


def test_so_many_prompt_tokens_wait_and_no_more() -> None:
    books = admission(max_queued_tokens=100)
    books.enter(request("a", prompt=70), 0.0)
    assert books.refusal("", 30, None, room()) is None
    assert refused(books, prompt=31).code == "queue_full"


def test_without_a_ready_worker_nothing_comes_in() -> None:
    for state in (WorkerState.STARTING, WorkerState.DRAINING, WorkerState.LOST):
        error = admission().refusal("", 0, None, Room([view(state=state)], (), ROOM))
        assert error is not None
        assert (error.status, error.code) == (503, "no_worker")
        assert error.retry_after > 0


@pytest.mark.fault(56)
def test_a_tenant_meets_its_own_limits_and_nobody_elses() -> None:
    limits = {"a": TenantLimits(max_requests=2, max_queued_tokens=50)}
    books = admission(tenants=limits)
    books.enter(request("0", "a", prompt=30), 0.0)
    assert refused(books, "a", prompt=21).code == "tenant_tokens"
    assert books.refusal("a", 20, None, room()) is None
    books.enter(request("1", "a", prompt=20), 0.0)
    error = refused(books, "a")
    assert (error.status, error.code) == (429, "tenant_requests")
    assert books.refusal("b", 10_000, None, room()) is None


def test_one_request_may_be_longer_than_the_bound_on_queued_tokens() -> None:
    books = admission(max_queued_tokens=5, anybody=TenantLimits(max_queued_tokens=5))
    assert books.refusal("", 10, None, room()) is None
    books.enter(request("0"), 0.0)
    assert refused(books).code == "tenant_tokens"


def test_who_would_wait_too_long_is_told_when_to_come_back() -> None:
    books = admission(max_queue_seconds=5.0)
    books.enter(request("0", prompt=7000), 0.0)
    error = refused(books)  # 7 s by the measured rate, of which 5 would do
    assert error.code == "queue_full"
    assert 2.0 <= error.retry_after <= 2.0 * (1 + JITTER)


def test_a_client_without_patience_is_not_kept_waiting() -> None:
    books = admission()
    books.enter(request("0", prompt=7000), 0.0)
    assert books.refusal("", 10, 8.0, room()) is None
    assert refused(books, patience=6.0).code == "queue_full"


@pytest.mark.fault(56)
def test_anothers_queue_does_not_count_against_a_tenant_whose_turn_is_next() -> None:
    books = admission(max_queue_seconds=5.0)
    books.enter(request("0", "noisy", prompt=100_000), 0.0)
    assert refused(books, "noisy").code == "queue_full"
    assert books.wait_seconds(Prompt(10, "victim"), room()) == 0
    books.enter(request("1", "victim", prompt=1000), 0.0)
    assert books.wait_seconds(Prompt(10, "victim"), room()) == pytest.approx(2.0)  # its own, and as much of the other's


@pytest.mark.fault(60)
def test_refused_clients_are_not_told_to_come_back_all_at_once() -> None:
    books = admission(max_requests=1)
    books.enter(request("0", prompt=20_000), 0.0)
    times = sorted(refused(books).retry_after for _ in range(100))
    assert 20.0 <= times[0] < times[-1] <= 20.0 * (1 + JITTER)
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert max(gaps) < 4 * 20.0 * JITTER / 100
    assert times[-1] - times[0] > 0.9 * 20.0 * JITTER
    assert books.refused == {"queue_full": 100}


def test_the_measured_drain_counts_if_it_is_slower_than_prefill() -> None:
    books = admission(max_requests=1000)
    for number in range(30):
        books.enter(request(str(number), prompt=100), 0.0)
    for second in range(1, 11):  # 100 tokens a second, where prefill alone would do a thousand
        books.start(str(second), float(second))
    assert books.wait_seconds(Prompt(10), room()) == pytest.approx(20.0, rel=0.2)


def test_a_kv_share_is_kept_and_one_request_may_always_run() -> None:
    books = admission(tenants={"a": TenantLimits(kv_share=0.1)})  # of 1000 tokens
    for number in range(3):
        books.enter(request(str(number), "a", prompt=60), 0.0)
    books.enter(request("other", "b", prompt=60), 0.0)
    for expected in ("0", "other", "1"):
        assert books.next(room()) == expected
        books.start(expected, 0.0)
    assert books.next(room()) is None  # 140 of 100 tokens are promised
    books.leave(request("0", "a"))
    assert books.next(room()) == "2"


def test_who_waits_too_long_is_given_up_by_name() -> None:
    books = admission(queue_timeout=10.0)
    books.enter(request("0"), 0.0)
    books.enter(request("1"), 5.0)
    [(request_id, error)] = books.expired(11.0)
    assert (request_id, error.status, error.code) == ("0", 503, "queue_timeout")
    assert error.retry_after > 0


def test_books_are_empty_in_the_end() -> None:
    books = admission()
    for number in range(10):
        books.enter(request(str(number), f"tenant {number}"), 0.0)
        if number % 2:
            books.start(str(number), 1.0)
    for number in range(10):
        books.leave(request(str(number), f"tenant {number}"))
    assert (len(books.queue), books._usage, books._running) == (0, {}, {})


@pytest.mark.parametrize(
    ("pending", "stats", "tokens", "fits"),
    [
        ((), {}, 1000, True),
        ((Pending("w", "w", Prompt(999)),), {}, 1, True),
        ((Pending("w", "w", Prompt(1000)),), {}, 251, False),  # a second of prefill is ahead of it
        ((Pending("w", "w", Prompt(499)),), {"prefill_rate": 1.0}, 1, True),  # they may share a step
        ((Pending("w", "w", Prompt(500)),), {"prefill_rate": 1.0}, 126, False),
        ((Pending("w", "w", Prompt(500)),), {"prefill_rate": 1.0}, 125, True),  # short beside a long one
        ((Pending("w", "w", Prompt(500)),) * 2, {"prefill_rate": 1.0}, 1, False),
        ((Pending("w", "w", Prompt(1)),) * 64, {}, 1, False),
        ((), {"blocks_used": 90}, 100, True),
        ((), {"blocks_used": 90}, 101, False),
        ((Pending("w", "w", Prompt(100)),), {"blocks_used": 90}, 1, False),  # promised, and not reported yet
        ((), {"blocks_used": 1, "waiting": 4}, 1, False),
    ],
)
def test_room_for_one_more(pending: tuple[Pending, ...], stats: dict[str, Any], tokens: int, fits: bool) -> None:
    assert room(*pending, **stats).takes(Route("w"), Prompt(tokens)) is fits


@pytest.mark.fault(56)
def test_what_others_have_there_takes_nobodys_room() -> None:
    slow = room(Pending("w", "w", Prompt(500, "noisy")), prefill_rate=1.0)
    assert slow.takes(Route("w"), Prompt(200, "victim"))
    assert not slow.takes(Route("w"), Prompt(200, "noisy"))
    assert slow.fits(Route("w"), Prompt(200, "noisy")), "it has enough: that is no reason for others to wait"
    full = [Pending("w", "w", Prompt(1, str(number))) for number in range(64)]
    assert not room(*full).fits(Route("w"), Prompt(1, "victim"))


def test_room_on_both_ends_of_a_route() -> None:
    pair = [view("p", Role.PREFILL), view("d", Role.DECODE)]
    split, local = Route("d", "p", "shm"), Route("d")
    assert Room(pair, (), ROOM).takes(split, Prompt(10))
    busy = Room(pair, [Pending("p", "d", Prompt(5000))], RoomLimits())
    assert not busy.takes(split, Prompt(10))
    elsewhere = Room(pair, [Pending("p", "p", Prompt(5000))], ROOM)
    assert elsewhere.takes(local, Prompt(10))  # who prefills elsewhere need not wait
    assert not Room([pair[0], view("d", Role.DECODE, blocks_used=100)], (), ROOM).takes(split, Prompt(10))
    assert not Room([], (), ROOM)
