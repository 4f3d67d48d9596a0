"""A tenant that floods a fleet with long prompts, in virtual time: what another one's first tokens wait for."""

from __future__ import annotations

import random

import pytest

from diptych.core.actions import Deliver, RouterAction
from diptych.core.events import RequestSubmitted, RouterEvent
from diptych.core.fleet import Role
from diptych.core.request import Request, SamplingParams
from diptych.engine.scripted import ScriptedModel, StepCost
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.routing import Routing
from diptych.sim.scenario import RequestSpec, Scenario, WorkerSpec
from diptych.sim.world import World

STEP_TOKENS = 128
COST = StepCost(step=1e-3, token=8e-4)
VICTIM_TOKENS, FLOOD_TOKENS = 75, 500
FULL_STEP = COST.step + STEP_TOKENS * COST.token
SECONDS = 6.0


class Observed(RouterPolicy):
    """Notes when requests come, and when their first tokens leave."""

    def __init__(self) -> None:
        super().__init__(Routing())
        self.came: dict[str, float] = {}
        self.first_token: dict[str, float] = {}

    def handle(self, event: RouterEvent, now: float) -> list[RouterAction]:
        if isinstance(event, RequestSubmitted):
            self.came[event.request.request_id] = now
        actions = super().handle(event, now)
        for action in actions:
            if isinstance(action, Deliver) and action.output.index == 0:
                self.first_token[action.output.request_id] = now
        return actions

    def ttfts(self, tenant: str) -> list[float]:
        return sorted(when - self.came[name] for name, when in self.first_token.items() if name.startswith(tenant))


def arrivals(tenant: str, rate: float, tokens: int, max_tokens: int) -> list[RequestSpec]:
    """Named after their tenant, at random times."""
    rng = random.Random(tenant)
    specs: list[RequestSpec] = []
    at = 0.5
    while (at := at + rng.expovariate(rate)) < SECONDS:
        request = Request(
            request_id=f"{tenant}{len(specs)}",
            prompt_token_ids=tuple(rng.randrange(1, 256) for _ in range(tokens)),
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
            tenant=tenant,
            cache_salt=tenant,
        )
        specs.append(RequestSpec(at, request))
    return specs


def play(*loads: list[RequestSpec]) -> Observed:
    """One prefill and one decode worker, without faults; everything that the simulation checks is checked."""
    workers = (("p0", Role.PREFILL), ("d0", Role.DECODE))
    world = World(
        Scenario(
            seed=1,
            workers=tuple(WorkerSpec(name, role, "a", 2000, True, block_size=16) for name, role in workers),
            requests=tuple(sorted((spec for load in loads for spec in load), key=lambda spec: spec.at)),
            faults=(),
            model=ScriptedModel(num_layers=1, num_kv_heads=1),
            cost=COST,
            latency=0.0005,
            report_seconds=0.02,
            post_seconds=1e-4,
            handoff_timeout=120.0,
            max_batch_tokens=STEP_TOKENS,
            max_sequences=32,
        )
    )
    world.router.policy = policy = Observed()
    outcome = world.run()
    assert outcome.violation is None
    assert not outcome.failed
    return policy


@pytest.mark.fault(56)
def test_a_victim_waits_for_the_running_step_and_little_more() -> None:
    victim = arrivals("victim", 3.0, VICTIM_TOKENS, 4)
    flood = arrivals("flood", 3.0, FLOOD_TOKENS, 1)  # more than can be computed
    alone, beside = play(victim), play(victim, flood)
    before, after = alone.ttfts("victim"), beside.ttfts("victim")
    assert len(before) == len(after) == len(victim)
    assert after[-1] <= before[-1] + 1.5 * FULL_STEP, "steps take up to half longer than modelled"
    assert after[len(after) // 2] <= before[len(before) // 2] + FULL_STEP
    assert len(beside.ttfts("flood")) == len(flood), "nobody starves"
