"""A failing history becomes smaller, and tells what happened."""

from __future__ import annotations

import pytest

from diptych.bench.fault_sim import tell
from diptych.core.actions import AbortOn, RouterAction
from diptych.core.events import RouterEvent
from diptych.policy.dispatch import RouterPolicy
from diptych.sim.scenario import draw
from diptych.sim.shrink import shrink
from diptych.sim.world import World


def forget_to_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = RouterPolicy.handle

    def without_aborts(self: RouterPolicy, event: RouterEvent, now: float) -> list[RouterAction]:
        return [action for action in handle(self, event, now) if not isinstance(action, AbortOn)]

    monkeypatch.setattr(RouterPolicy, "handle", without_aborts)


def test_a_violation_shrinks_and_makes_a_story(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_to_abort(monkeypatch)
    seed = next(seed for seed in range(200) if World(draw(seed)).run().violation is not None)
    large = draw(seed)
    small = shrink(large)
    assert len(small.requests) <= len(large.requests)
    assert len(small.faults) + len(small.requests) <= 3
    told = list(tell(small))
    assert any("arrives" in line for line in told)
    assert told[-1].startswith("violated: ")
