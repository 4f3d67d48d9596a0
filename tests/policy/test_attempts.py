"""Who runs where, and who waits until when."""

from __future__ import annotations

from router_story import LOCAL, Router, running_on

from diptych.core import events as on
from diptych.core.fleet import WorkerState


def fail(router: Router, request_id: str = "r") -> str:
    """Its attempt comes to nothing, by nobody's fault; returns where it was."""
    live = router.policy.live[request_id]
    name = running_on(router, request_id)
    router.handle(on.RequestFailed(name, live.attempt_id, "duplicate_request", "again"))
    return name


def test_what_failed_somewhere_is_tried_somewhere_else() -> None:
    router = Router("m0", "m1")
    router.submit(prefer=LOCAL)
    first = fail(router)
    assert {first, running_on(router)} == {"m0", "m1"}


def test_with_nowhere_else_it_is_tried_there_again() -> None:
    router = Router("m0")
    router.submit(prefer=LOCAL)
    fail(router)
    assert (running_on(router), router.policy.retried) == ("m0", 1)


def test_the_next_plan_is_that_of_who_may_begin_first() -> None:
    router = Router("m0", "m1")
    for name in ("r", "s"):
        router.submit(name, LOCAL)
        fail(router, name)
        fail(router, name)  # the second repetition has to wait
    due = sorted(router.policy.live[name].not_before for name in ("r", "s"))
    assert 0.0 < due[0] < due[1]
    assert router.policy.wake_at(0.0) == due[0]
    router.at(due[0])
    assert router.policy.wake_at(due[0]) == due[1]


def test_whoever_could_begin_and_has_nowhere_to_plans_nothing() -> None:
    """A plan in the past would make the router's loop spin."""
    router = Router("m0")
    router.submit(prefer=LOCAL)
    router.up("m0", WorkerState.STARTING)
    fail(router)
    assert not router.policy.live["r"].workers
    assert router.policy.wake_at(router.now) is None
    router.up("m0")
    assert running_on(router) == "m0"


def test_prompts_count_where_they_are_prefilled() -> None:
    router = Router("p0", "d0")
    router.submit()
    [pending] = router.policy._attempts.pending()
    assert (pending.prefiller, pending.decoder, pending.prompt.tokens) == ("p0", "d0", 40)
    router.handle(on.TicketGranted("d0", "r", b"t", 0))
    router.first("p0")
    assert router.policy._attempts.pending() == []
