"""Requests that kill workers, and requests that fail again and again."""

from __future__ import annotations

import pytest
from router_story import LOCAL, Router, prove, running_on

from diptych.core import actions as do
from diptych.core import events as on
from diptych.policy.recovery import POISON_CRASHES


@pytest.mark.fault(47)
def test_what_kills_workers_is_ended_after_three_and_says_so() -> None:
    router = Router("m0", "m1", "m2")
    router.submit(prefer=LOCAL)
    killed = 0
    while "r" in router.policy.live:
        killed += 1
        router.now += 1.0
        victim = running_on(router)
        router.handle(on.WorkerGone(victim))
        router.at(router.now + 5.0)
    assert killed == POISON_CRASHES
    [failure] = [action for action in router.said if isinstance(action, do.DeliverFailure)]
    assert (failure.error.code, failure.error.status) == ("poison_request", 500)


def test_when_everybody_dies_at_once_that_is_no_request_s_fault() -> None:
    """Deaths are noticed one after the other, so that the stream is sent to a worker that is dead already."""
    names = ("m0", "m1", "m2", "m3")
    router = Router(*names)
    router.submit(prefer=LOCAL)
    router.now = 1.0
    for name in sorted(names, key=lambda name: name != running_on(router)):
        router.handle(on.WorkerGone(name))
    assert router.policy.live["r"].crashes == 1


def test_progress_clears_a_request_of_suspicion() -> None:
    router = Router("m0", "m1")
    router.submit(prefer=LOCAL)
    for number in range(1, 6):
        attempt = "r" if number == 1 else f"r~{number}"
        victim = running_on(router)
        made = len(router.policy.live["r"].output_token_ids)
        router.first(victim, attempt, made)
        for index in range(made + 1, made + 9):
            router.token(victim, index, attempt)
        router.now += 1.0
        router.handle(on.WorkerGone(victim))
        router.up("m0")
        router.up("m1")
        router.at(router.now + 31.0)
        prove(router)
    assert "r" in router.policy.live
    assert not [action for action in router.said if isinstance(action, do.DeliverFailure)]


def test_suspects_are_tried_one_at_a_time() -> None:
    """Four requests were there when the worker died, twice. One of them may be why; the others are innocent."""
    router = Router("m0")
    names = [f"r{number}" for number in range(4)]
    for name in names:
        router.submit(name, LOCAL)

    def die_and_come_back() -> list[str]:
        router.now += 1.0
        router.handle(on.WorkerGone("m0"))
        router.at(router.now + 5.0)
        router.up("m0")
        prove(router)
        return [name for name in names if name in router.policy.live and running_on(router, name)]

    assert die_and_come_back() == names
    [suspect] = die_and_come_back()
    for index in range(8):
        router.first("m0", f"{suspect}~3", index)
    running = [name for name in names if running_on(router, name)]
    assert len(running) == 2  # the first has cleared itself, so the next one is tried
    [guilty] = set(running) - {suspect}
    die_and_come_back()
    assert [a.request_id for a in router.said if isinstance(a, do.DeliverFailure)] == [guilty]
    assert len(router.policy.live) == 3


@pytest.mark.fault(60)
def test_what_fails_again_and_again_is_paid_for() -> None:
    router = Router("m0", "m1")
    for number in range(200):
        router.submit(f"r{number}", LOCAL)
    attempts = 0
    for _ in range(8):
        for live in list(router.policy._attempts.running.values()):
            attempts += 1
            router.handle(on.RequestFailed(live.route.decode, live.attempt_id, "duplicate_request", ""))  # type: ignore[union-attr]
        router.at(router.now + 0.25)
    # the first of each, one repetition that is free, the budget's burst and its share, and a trickle of 5 per second
    assert 400 < attempts <= 400 + 50 + 20 + 5 * router.now + 1
    assert len(router.policy.live) == 200  # none is given up for that
