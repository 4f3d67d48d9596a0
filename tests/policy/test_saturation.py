"""How much room there is: what each worker is given ahead, and what the fleet holds."""

from __future__ import annotations

from typing import Any

import pytest

from diptych.core.fleet import Role, Route, WorkerState, WorkerStats, WorkerView
from diptych.policy.backlog import Prompt
from diptych.policy.saturation import Pending, Room, RoomLimits

LIMITS = RoomLimits(backlog_seconds=0.25, backlog_tokens=1000, max_pending=4, max_waiting=2)
SPLIT = Route("d", "p", "shm")


def view(name: str, role: Role, **stats: Any) -> WorkerView:
    stats = {"prefill_rate": 1000.0} | stats
    return WorkerView(
        worker_id=name,
        role=role,
        state=WorkerState.READY,
        epoch=1,
        num_blocks=100,
        block_size=10,
        stats=WorkerStats(**stats),
    )


def room(*workers: WorkerView, pending: tuple[Pending, ...] = ()) -> Room:
    return Room(workers or (view("p", Role.PREFILL), view("d", Role.DECODE)), pending, LIMITS)


def test_the_fleet_holds_what_its_decode_workers_hold() -> None:
    assert room().kv_tokens == 1000
    assert room(view("p", Role.PREFILL), view("d", Role.DECODE), view("m", Role.MIXED)).kv_tokens == 2000
    assert room(view("p", Role.PREFILL)).kv_tokens == 1000  # with nobody else it decodes


def pending(prefiller: str, decoder: str, tokens: int) -> Pending:
    return Pending(prefiller, decoder, Prompt(tokens))


def test_prefill_workers_are_as_fast_as_all_of_them_and_as_busy_as_the_least() -> None:
    workers = (view("p", Role.PREFILL), view("q", Role.PREFILL, prefill_rate=500.0), view("d", Role.DECODE))
    assert room(*workers).prefill_rate == pytest.approx(1500.0)
    both = (pending("p", "d", 3000), pending("q", "d", 1000))
    assert room(*workers, pending=both).busy_seconds(Prompt(1)) == pytest.approx(2.0)
    assert room(*workers, pending=both[:1]).busy_seconds(Prompt(1)) == 0.0
    alone = room(view("d", Role.DECODE), pending=(pending("d", "d", 2000),))
    assert (alone.prefill_rate, alone.busy_seconds(Prompt(1))) == pytest.approx((1000.0, 2.0))


def test_a_worker_is_given_so_many_tokens_ahead_however_slow_it_is() -> None:
    workers = (view("p", Role.PREFILL, prefill_rate=10.0), view("d", Role.DECODE))
    prompt = Prompt(400)
    assert room(*workers, pending=(pending("p", "other", 500),) * 1).takes(SPLIT, prompt)
    assert room(*workers, pending=(pending("p", "other", 499),) * 2).takes(SPLIT, prompt)
    assert not room(*workers, pending=(pending("p", "other", 500),) * 2).takes(SPLIT, prompt)


def test_a_fast_worker_is_given_more_as_long_as_it_takes_no_time() -> None:
    workers = (view("p", Role.PREFILL, prefill_rate=1e6), view("d", Role.DECODE, blocks_used=0))
    assert room(*workers, pending=(pending("p", "other", 5000),)).takes(SPLIT, Prompt(2000))


def test_an_idle_worker_takes_what_will_never_fit() -> None:
    """It says so itself (`kv_exhausted`); here the request would wait for ever."""
    assert room().fits(SPLIT, Prompt(1001))
    assert not room(pending=(pending("p", "d", 10),)).fits(SPLIT, Prompt(1000))
    assert not room(view("p", Role.PREFILL), view("d", Role.DECODE, blocks_used=1)).fits(SPLIT, Prompt(1000))
    assert room(view("p", Role.PREFILL), view("d", Role.DECODE, blocks_used=1)).fits(SPLIT, Prompt(990))
