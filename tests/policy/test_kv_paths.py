"""Pairs show that they can hand KV over, before anybody depends on it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.actions import AbortOn, ReserveBlocks, RouterAction, StartLocal, StartPrefill
from diptych.core.events import (
    FirstTokenMade,
    RequestFailed,
    Tick,
    TicketGranted,
    TokensMade,
    WorkerGone,
    WorkerUpdated,
)
from diptych.core.fleet import Readiness, Role, WorkerState, WorkerView
from diptych.core.request import FinishReason, SampledToken, TokenOutput
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.kv_paths import KVPaths
from diptych.policy.recovery import RecoverySettings
from diptych.policy.routing import Routing


def view(worker_id: str, **changes: Any) -> WorkerView:
    role = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}[worker_id[0]]
    fields = {"state": WorkerState.READY, "epoch": 1, "num_blocks": 64, "transports": ("shm",), **changes}
    return WorkerView(worker_id=worker_id, role=role, **fields)


def router() -> RouterPolicy:
    return RouterPolicy(Routing(), recovery=RecoverySettings(try_paths=True))


def join(policy: RouterPolicy, *workers: str, now: float = 0.0) -> list[RouterAction]:
    return [action for worker in workers for action in policy.handle(WorkerUpdated(view(worker)), now)]


def hand_over(policy: RouterPolicy, reserve: RouterAction, now: float = 0.1) -> None:
    """Play the two workers of a canary."""
    assert isinstance(reserve, ReserveBlocks)
    name, decode = reserve.request.request_id, reserve.worker_id
    [start] = policy.handle(TicketGranted(decode, name, b"ticket", 0), now)
    assert isinstance(start, StartPrefill)
    policy.handle(FirstTokenMade(start.worker_id, TokenOutput(name, 0, SampledToken(1)), 0, 0.0, 0.0), now)
    assert policy.readiness() is not Readiness.YES  # the first token comes from the prefill worker
    policy.handle(TokensMade(decode, (TokenOutput(name, 1, SampledToken(1), FinishReason.LENGTH),)), now)


def test_a_new_pair_hands_a_canary_over_before_it_counts_as_ready() -> None:
    policy = router()
    assert join(policy, "p0") == []
    assert policy.readiness() is Readiness.NO
    [reserve] = join(policy, "d0")
    assert policy.readiness() is Readiness.NO
    assert policy.stats(0.0).running == 0  # it is no client's
    hand_over(policy, reserve)
    assert policy.readiness() is Readiness.YES
    assert policy.stats(0.2).pair_breakers == {}
    assert policy.handle(Tick(), 1.0) == []


def test_a_pair_that_cannot_hand_over_serves_unsplit_and_is_tried_again() -> None:
    policy = router()
    [reserve] = join(policy, "p0", "d0")
    failed = RequestFailed("d0", reserve.request.request_id, "transfer_failed", "no route to host")  # type: ignore[union-attr]
    policy.handle(failed, 0.1)
    assert policy.readiness() is Readiness.DEGRADED
    assert policy.stats(0.2).pair_breakers == {("p0", "d0"): "open"}
    wake = policy.wake_at(0.2)
    assert wake is not None
    [again] = policy.handle(Tick(), wake)
    assert policy.readiness() is Readiness.DEGRADED
    hand_over(policy, again, wake + 0.1)
    assert policy.readiness() is Readiness.YES


def test_a_canary_that_never_comes_back_has_a_deadline() -> None:
    policy = router()
    join(policy, "p0", "d0")
    policy.handle(Tick(), 11.0)
    assert policy.readiness() is Readiness.DEGRADED


def test_a_partner_that_dies_in_the_middle_is_replaced() -> None:
    policy = router()
    join(policy, "p0", "d0")
    assert policy.handle(WorkerGone("p0"), 0.1) == [AbortOn("d0", "canary~1")]
    [reserve] = join(policy, "p1", now=0.2)
    hand_over(policy, reserve, 0.3)
    assert policy.readiness() is Readiness.YES


def test_mixed_workers_need_no_path() -> None:
    policy = router()
    assert join(policy, "m0", "m1") == []
    assert policy.readiness() is Readiness.YES
    join(policy, "p0", "d0")
    assert policy.readiness() is Readiness.DEGRADED  # it has served all the time


def test_workers_without_a_common_transport_are_degraded() -> None:
    policy = router()
    policy.handle(WorkerUpdated(view("p0", host="a")), 0.0)
    assert policy.handle(WorkerUpdated(view("d0", host="b")), 0.0) == []
    assert policy.readiness() is Readiness.DEGRADED


@given(st.permutations(["p0", "p1", "p2", "d0", "d1"]))
def test_every_worker_is_in_a_pair_and_pairs_are_few(order: list[str]) -> None:
    policy = router()
    pairs = [
        (action.request.request_id, action.worker_id)
        for action in join(policy, *order)
        if isinstance(action, ReserveBlocks)
    ]
    tried = {live.pair for live in policy._attempts.running.values()}
    assert len(pairs) == len(tried) <= 4
    assert {worker for pair in tried if pair is not None for worker in pair} == set(order)


@given(st.lists(st.tuples(st.sampled_from(["join", "gone", "ok", "fail"]), st.sampled_from(["p0", "p1", "d0", "d1"]))))
def test_whoever_has_no_pair_is_to_be_tried(happened: list[tuple[str, str]]) -> None:
    """Whatever happens to workers and canaries."""
    paths, there = KVPaths(enabled=True), {}
    running: set[tuple[str, str]] = set()
    proven: set[tuple[str, str]] = set()
    blocked: set[tuple[str, str]] = set()
    for what, worker in happened:
        pair = next((pair for pair in sorted(running) if worker in pair), None)
        if what == "join" and worker not in there:
            there[worker] = view(worker)
            paths.joined(worker)
        elif what == "gone" and worker in there:
            del there[worker]
            for pairs in (running, proven, blocked):
                pairs.difference_update([pair for pair in pairs if worker in pair])
            paths.gone(worker)
        elif what == "ok" and pair is not None:
            running.discard(pair)
            proven.add(pair)
            paths.succeeded(pair)
        elif what == "fail" and pair is not None:
            running.discard(pair)
            blocked.add(pair)
            paths.failed(pair)
        running.update(paths.due(list(there.values()), Routing().transport, blocked))
        known = {worker for pair in running | proven for worker in pair}
        assert paths.untried == there.keys() - known
        for idle in paths.untried:
            partners = {(p, d) for p in there for d in there if p[0] == "p" and d[0] == "d" and idle in (p, d)}
            assert partners <= blocked
        assert (paths.readiness(list(there.values()), blocked) is Readiness.YES) <= bool(there)


def test_a_path_that_has_been_seen_to_work_needs_no_canary() -> None:
    paths = KVPaths(enabled=True)
    for worker in ("p0", "d0"):
        paths.joined(worker)
    paths.succeeded(("p0", "d0"))
    assert paths.due([view("p0"), view("d0")], Routing().transport, ()) == []
    assert paths.readiness([view("p0"), view("d0")], ()) is Readiness.YES
    assert paths.readiness([view("p0"), view("d0")], [("p0", "d0")]) is Readiness.DEGRADED


@pytest.mark.parametrize("worker", ["p0", "d0"])
def test_readiness_needs_both_ends_of_a_path(worker: str) -> None:
    paths = KVPaths(enabled=True)
    paths.succeeded(("p0", "d0"))
    assert paths.readiness([view(worker)], ()) is Readiness.NO


@pytest.mark.parametrize("worker", ["p0", "d0"])
def test_a_new_life_shows_it_anew(worker: str) -> None:
    policy = router()
    [reserve] = join(policy, "p0", "d0")
    hand_over(policy, reserve)
    policy.handle(WorkerGone(worker), 1.0)
    assert policy.readiness() is Readiness.NO
    actions = join(policy, worker, now=1.0)
    assert policy.readiness() is Readiness.NO
    while not any(isinstance(action, ReserveBlocks) for action in actions):  # it has died: first it is tried alone
        wake = policy.wake_at(1.0)
        actions += policy.handle(Tick(), 2.0 if wake is None else wake)
        for action in list(actions):
            if isinstance(action, StartLocal):
                made = TokenOutput(action.request.request_id, 0, SampledToken(1), FinishReason.LENGTH)
                actions += policy.handle(FirstTokenMade(worker, made, 0, 0.0, 0.0), 2.0)
    assert policy.readiness() is Readiness.NO
    hand_over(policy, actions[-1], 2.1)
    assert policy.readiness() is Readiness.YES


def test_workers_that_come_together_are_tried_with_one_partner_each() -> None:
    paths = KVPaths(enabled=True)
    workers = [view(name) for name in ("p0", "p1", "p2", "d0", "d1", "d2")]
    for worker in workers:
        paths.joined(worker.worker_id)
    due = paths.due(workers, Routing().transport, ())
    assert due == [("p0", "d0"), ("p1", "d1"), ("p2", "d2")]
    assert paths.due(workers, Routing().transport, ()) == []
