"""Mistakes put into policy on purpose: the simulation finds each within a few histories."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from diptych.core.actions import AbortOn, RouterAction
from diptych.core.events import RouterEvent, TokensMade
from diptych.policy import handoff
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.handoff import Effect, SourceEvent, SourceState, TargetEvent, TargetState, Transition
from diptych.sim.scenario import draw
from diptych.sim.world import World

MOST = 250  # histories


def release_while_somebody_may_write(patch: pytest.MonkeyPatch) -> None:
    hasty = Transition(TargetState.RELEASED, (Effect.REVOKE_TICKET, Effect.RELEASE_BLOCKS))
    patch.setitem(handoff.TARGET_TABLE, (TargetState.RESERVED, TargetEvent.ABORTED), hasty)


def release_while_the_sender_reads(patch: pytest.MonkeyPatch) -> None:
    hasty = Transition(SourceState.RELEASED, (Effect.STOP_WRITING, Effect.RELEASE_BLOCKS))
    for state in (SourceState.PREFILLING, SourceState.OFFERED):
        patch.setitem(handoff.SOURCE_TABLE, (state, SourceEvent.ABORTED), hasty)


def leak_when_rejected(patch: pytest.MonkeyPatch) -> None:
    forgetful = Transition(SourceState.STOPPING, (Effect.REPORT_FAILURE,))
    for state in (SourceState.PREFILLING, SourceState.OFFERED):
        patch.setitem(handoff.SOURCE_TABLE, (state, SourceEvent.REJECTED), forgetful)


def forget_to_abort(patch: pytest.MonkeyPatch) -> None:
    handle = RouterPolicy.handle

    def without_aborts(self: RouterPolicy, event: RouterEvent, now: float) -> list[RouterAction]:
        return [action for action in handle(self, event, now) if not isinstance(action, AbortOn)]

    patch.setattr(RouterPolicy, "handle", without_aborts)


def deliver_twice(patch: pytest.MonkeyPatch) -> None:
    handle = RouterPolicy.handle

    def again(self: RouterPolicy, event: RouterEvent, now: float) -> list[RouterAction]:
        actions = handle(self, event, now)
        return actions + actions if isinstance(event, TokensMade) and len(actions) == 1 else actions

    patch.setattr(RouterPolicy, "handle", again)


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        (release_while_somebody_may_write, "counts blocks as free that"),
        (release_while_the_sender_reads, "which is still being read for"),
        (leak_when_rejected, "when all is over"),
        (forget_to_abort, "nobody has told it to stop"),
        (deliver_twice, "gets token"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_is_found(mistake: Callable[[pytest.MonkeyPatch], None], found: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mistake(patch)
        violations = (World(draw(seed)).run().violation for seed in range(MOST))
        assert any(found in violation for violation in violations if violation is not None)
