"""Requests in the router's queue: begun in fair order when there is room, and over in every way they can be."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from world import World

from diptych.core.actions import AbortOn, DeliverFailure, RouterAction, StartLocal
from diptych.core.events import (
    FirstTokenMade,
    RequestCancelled,
    RequestFailed,
    RequestSubmitted,
    TokensMade,
    WorkerGone,
    WorkerUpdated,
)
from diptych.core.fleet import Role, WorkerState, WorkerStats, WorkerView
from diptych.core.request import FinishReason, Request, SampledToken, SamplingParams, TokenOutput
from diptych.engine.scripted import expected_tokens
from diptych.policy.admission import AdmissionLimits, TenantLimits
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.routing import Routing
from diptych.policy.saturation import RoomLimits

WORKER = WorkerView(worker_id="m0", role=Role.MIXED, state=WorkerState.READY, epoch=1, num_blocks=1000)
ONE_AT_A_TIME = RoomLimits(max_pending=1)


def router(**limits: object) -> RouterPolicy:
    policy = RouterPolicy(Routing(), AdmissionLimits(**{"room": ONE_AT_A_TIME, **limits}))  # type: ignore[arg-type]
    policy.handle(WorkerUpdated(WORKER), 0.0)
    return policy


def request(name: str, tenant: str = "", max_tokens: int = 2) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(request_id=name, prompt_token_ids=(1,) * 50, tenant=tenant, sampling=sampling)


def submit(policy: RouterPolicy, *names: str, now: float = 0.0) -> list[RouterAction]:
    """Names begin with their tenant."""
    return [action for name in names for action in policy.handle(RequestSubmitted(request(name, name[0])), now)]


def first_token(policy: RouterPolicy, name: str, now: float = 0.0) -> list[RouterAction]:
    output = TokenOutput(name, 0, SampledToken(7))
    return policy.handle(FirstTokenMade("m0", output, 0, 0.25, 0.5), now)


def started(actions: list[RouterAction]) -> list[str]:
    return [action.request.request_id for action in actions if isinstance(action, StartLocal)]


@pytest.mark.fault(56)
def test_tenants_take_turns_however_many_requests_one_of_them_sends() -> None:
    policy = router()
    assert started(submit(policy, "a0", "a1", "a2", "a3", "b0", "b1")) == ["a0"]
    order = ["a0"]
    while policy.admission.queue:
        order += started(first_token(policy, order[-1]))
    assert order == ["a0", "b0", "a1", "b1", "a2", "a3"] or order == ["a0", "a1", "b0", "a2", "b1", "a3"]


@pytest.mark.fault(56)
def test_a_tenant_with_enough_at_the_worker_holds_nobody_else_back() -> None:
    policy = router(room=RoomLimits(backlog_tokens=1, backlog_seconds=0.0))
    assert started(submit(policy, "a0", "a1", "a2")) == ["a0"]
    assert started(submit(policy, "b0", "b1")) == ["b0"]
    assert started(first_token(policy, "b0")) == ["b1"], "its own first token makes room for it, whoever else waits"
    assert started(first_token(policy, "a0")) == ["a1"]


@pytest.mark.fault(56)
def test_nobody_overtakes_a_request_for_which_there_are_no_blocks() -> None:
    """Else small ones of others could take every block that becomes free, for ever."""
    policy = router(room=RoomLimits())
    big = replace(request("a0", "a"), prompt_token_ids=(1,) * 15_000)
    full = replace(WORKER, stats=WorkerStats(blocks_used=500))
    policy.handle(WorkerUpdated(full), 0.0)
    assert started(policy.handle(RequestSubmitted(big), 0.0)) == []
    assert started(submit(policy, "b0")) == []
    assert started(policy.handle(WorkerUpdated(WORKER), 0.0)) == ["a0", "b0"]


def test_workers_are_told_the_weight_of_a_tenant() -> None:
    policy = router(room=RoomLimits(), tenants={"a": TenantLimits(weight=2.5)})
    orders = [action for action in submit(policy, "a0", "b0") if isinstance(action, StartLocal)]
    assert [order.request.weight for order in orders] == [2.5, 1.0]


def test_waiting_counts_as_queueing() -> None:
    policy = router()
    submit(policy, "a0", "a1")
    first_token(policy, "a0", now=3.0)
    live = policy.live["a1"]
    first_token(policy, "a1", now=4.0)
    assert (live.timeline.arrived, live.timeline.dispatched, live.timeline.queue_seconds) == (0.0, 3.0, 3.25)


def test_a_client_that_leaves_the_queue_costs_nobody_anything() -> None:
    policy = router()
    submit(policy, "a0", "a1", "a2")
    assert policy.handle(RequestCancelled("a1"), 0.0) == []
    assert started(first_token(policy, "a0")) == ["a2"]
    policy.handle(RequestCancelled("a0"), 0.0)
    assert AbortOn("m0", "a2") in policy.handle(RequestCancelled("a2"), 0.0)
    assert (policy.live, len(policy.admission.queue)) == ({}, 0)


def test_a_request_that_fails_for_good_leaves_the_books_and_its_place() -> None:
    policy = router()
    submit(policy, "a0", "a1")
    actions = policy.handle(RequestFailed("m0", "a0", "engine_corrupt", "not finite"), 0.0)
    assert [type(action) for action in actions] == [DeliverFailure, StartLocal]
    policy.handle(RequestFailed("m0", "a1", "engine_corrupt", "not finite"), 0.0)
    assert (policy.live, policy.stats(0.0).waiting, policy.admission._usage) == ({}, 0, {})


@pytest.mark.fault(33)
def test_what_waits_survives_the_only_worker() -> None:
    policy = router()
    submit(policy, "a0", "a1")
    gone = policy.handle(WorkerGone("m0"), 1.0)
    assert started(gone) == []
    assert "a1" in policy.live
    assert started(policy.handle(WorkerUpdated(WORKER), 2.0)) == ["canary~1"]  # it has died, and is tried out first
    done = TokenOutput("canary~1", 0, SampledToken(7), FinishReason.LENGTH)
    assert started(policy.handle(FirstTokenMade("m0", done, 0, 0.0, 0.0), 2.1)) == ["a0~2"]
    assert started(first_token(policy, "a0~2", 2.2)) == ["a1"]


def test_what_waits_too_long_is_given_up_and_the_rest_goes_on() -> None:
    policy = router(queue_timeout=10.0)
    submit(policy, "a0", "a1")
    submit(policy, "a2", now=5.0)
    actions = submit(policy, "a3", now=11.0)
    assert [(action.request_id, action.error.code) for action in actions if isinstance(action, DeliverFailure)] == [
        ("a1", "queue_timeout")
    ]
    assert started(first_token(policy, "a0", now=12.0)) == ["a2"]


def test_a_refused_request_is_all_that_its_submission_tells_of() -> None:
    """The shell takes the first failure for the refusal; nothing else may hide behind it."""
    policy = router(queue_timeout=10.0, max_requests=2)
    submit(policy, "a0", "a1")
    [action] = submit(policy, "a2", now=20.0)
    assert isinstance(action, DeliverFailure)
    assert (action.request_id, action.error.code) == ("a2", "queue_full")


def test_a_share_of_the_cache_is_waited_for_until_an_answer_ends() -> None:
    policy = router(tenants={"a": TenantLimits(kv_share=0.001)}, room=RoomLimits())  # 16 tokens
    assert started(submit(policy, "a0", "a1", "b0")) == ["a0", "b0"]
    assert started(first_token(policy, "a0")) == []
    last = TokenOutput("a0", 1, SampledToken(7), FinishReason.LENGTH)
    assert started(policy.handle(TokensMade("m0", (last,)), 0.0)) == ["a1"]


def test_checks_are_those_of_a_submission() -> None:
    policy = router(tenants={"a": TenantLimits(max_requests=1)})
    submit(policy, "a0")
    error = policy.check("a")
    assert error is not None
    assert error.code == "tenant_requests"
    assert policy.check("b") is None


@pytest.mark.parametrize("seed", range(10))
def test_a_saturated_world_loses_nothing(seed: int) -> None:
    """A flood into workers with room for two prompts each, with deaths and departures, and every answer right."""
    roles = {"p0": Role.PREFILL, "d0": Role.DECODE, "m0": Role.MIXED}
    world = World(seed, roles, num_blocks=40)
    world.router = RouterPolicy(Routing(), AdmissionLimits(room=RoomLimits(max_pending=2)))
    for worker in world.workers.values():
        world.route(WorkerUpdated(worker.view()))
    chance = random.Random(seed)
    requests = [
        Request(
            request_id=f"r{number}",
            prompt_token_ids=tuple(chance.randrange(1, 256) for _ in range(chance.randrange(1, 60))),
            sampling=SamplingParams(temperature=0.0, max_tokens=chance.randrange(1, 20)),
            tenant=chance.choice("abc"),
            priority=chance.randrange(-2, 3),
        )
        for number in range(40)
    ]
    cancelled = set()
    for request in requests:
        world.submit(request)
    assert len(world.router.admission.queue) > 20
    while world.step():
        if chance.random() < 0.002:
            world.kill(chance.choice(sorted(roles)))
        if chance.random() < 0.01 and world.router.live:
            victim = chance.choice(sorted(world.router.live))
            cancelled.add(victim)
            world.cancel(victim)
    for request in requests:
        if request.request_id not in cancelled and request.request_id not in world.errors:
            right = expected_tokens(request.prompt_token_ids, request.sampling.max_tokens, request.sampling)
            assert world.tokens[request.request_id] == right
    assert len(world.router.admission.queue) == 0
    assert world.router.admission._usage == {}
    world.check_clean()
