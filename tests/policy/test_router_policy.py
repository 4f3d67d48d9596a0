"""The router's policy alone: the test says what workers do, and what time it is."""

from __future__ import annotations

import pytest

from diptych.core import actions as do
from diptych.core import events as on
from diptych.core.errors import UnavailableError
from diptych.core.fleet import Role, WorkerState, WorkerView
from diptych.core.request import FinishReason, Preference, Request, SampledToken, SamplingParams, TokenOutput
from diptych.policy.admission import AdmissionLimits
from diptych.policy.deadlines import Deadlines
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.recovery import POISON_CRASHES, RecoverySettings
from diptych.policy.routing import Routing
from diptych.policy.saturation import RoomLimits

ENDLESS_ROOM = AdmissionLimits(room=RoomLimits(backlog_tokens=1 << 30, max_pending=1 << 30, max_waiting=1 << 30))
LIMITS = Deadlines(queue=60.0, reserve=50.0, first_token=40.0, stall=10.0, total=300.0, canary=5.0, drain=20.0)
SPLIT, LOCAL = Preference.SPLIT, Preference.LOCAL


class Router:
    """A policy and its clock. What it orders is in `said` until somebody reads it."""

    def __init__(self, *workers: str) -> None:
        self.policy = RouterPolicy(Routing(), ENDLESS_ROOM, recovery=RecoverySettings(deadlines=LIMITS))
        self.now = 0.0
        self.said: list[do.RouterAction] = []
        for name in workers:
            self.up(name)

    def handle(self, event: on.RouterEvent) -> list[do.RouterAction]:
        said = self.policy.handle(event, self.now)
        self.said += said
        return said

    def up(self, name: str, state: WorkerState = WorkerState.READY) -> list[do.RouterAction]:
        role = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}[name[0]]
        view = WorkerView(worker_id=name, role=role, state=state, epoch=1, num_blocks=1 << 20, transports=("shm",))
        return self.handle(on.WorkerUpdated(view))

    def submit(self, request_id: str = "r", prefer: Preference = SPLIT, timeout: float | None = None) -> None:
        sampling = SamplingParams(max_tokens=1000)
        prompt = tuple(range(40))
        self.handle(
            on.RequestSubmitted(
                Request(
                    request_id=request_id, prompt_token_ids=prompt, sampling=sampling, prefer=prefer, timeout=timeout
                )
            )
        )

    def first(self, worker: str, attempt: str = "r", index: int = 0) -> list[do.RouterAction]:
        output = TokenOutput(attempt, index, SampledToken(7))
        return self.handle(on.FirstTokenMade(worker, output, 0, 0.0, 0.0))

    def token(self, worker: str, index: int, attempt: str = "r", *, last: bool = False) -> list[do.RouterAction]:
        finish = FinishReason.LENGTH if last else None
        return self.handle(on.TokensMade(worker, (TokenOutput(attempt, index, SampledToken(7), finish),)))

    def at(self, now: float) -> list[do.RouterAction]:
        self.now = now
        return self.handle(on.Tick())

    def route(self, request_id: str = "r") -> str:
        route = self.policy.live[request_id].route
        assert route is not None
        return route.header()

    def error(self) -> UnavailableError:
        [failure] = [action for action in self.said if isinstance(action, do.DeliverFailure)]
        assert isinstance(failure.error, UnavailableError)
        return failure.error

    def canaries(self) -> list[do.StartLocal | do.ReserveBlocks]:
        started = [action for action in self.said if isinstance(action, do.StartLocal | do.ReserveBlocks)]
        return [action for action in started if action.request.request_id.startswith("canary~")]


def handed_over() -> Router:
    """A stream that runs on d0, one token after its hand-off."""
    router = Router("p0", "d0", "d1")
    router.submit()
    router.handle(on.TicketGranted("d0", "r", b"t", 0))
    router.first("p0")
    router.token("d0", 1)
    return router


# deadlines


@pytest.mark.fault(42)
def test_a_stalled_stream_goes_on_elsewhere_and_its_worker_is_blamed() -> None:
    router = handed_over()
    router.at(10.0)
    assert router.route().startswith("prefill=p0;decode=d0")
    said = router.at(10.1)
    assert do.AbortOn("d0", "r") in said
    assert router.route() == "prefill=p0;decode=d1;transport=shm"
    assert router.policy.health.workers.known == ("d0",)


def test_a_stream_that_stalls_while_others_get_on_is_nobody_s_fault() -> None:
    router = handed_over()
    router.submit("other", LOCAL)
    [other] = [name for name in ("d0", "d1") if name in router.route("other")]
    router.now = 5.0
    router.first("d0", "whoever")  # the engine of d0 runs
    router.at(11.0)
    assert "decode=d1" in router.route()
    assert router.policy.health.workers.known == ()
    assert other


@pytest.mark.fault(42)
def test_a_handoff_that_hangs_is_the_fault_of_the_pair() -> None:
    router = Router("p0", "d0", "d1")
    router.submit()
    router.handle(on.TicketGranted("d0", "r", b"t", 0))
    router.first("p0")
    router.at(10.1)
    assert router.route() == "prefill=p0;decode=d1;transport=shm"
    assert router.policy.health.pairs.blocked() == {("p0", "d0")}
    assert router.policy.health.workers.known == ()


def test_a_ticket_that_does_not_come_is_asked_for_elsewhere() -> None:
    router = Router("p0", "d0", "d1")
    router.submit()
    said = router.at(50.1)
    assert do.AbortOn("d0", "r") in said
    assert "decode=d1" in router.route()
    assert router.policy.health.workers.known == ()  # to be full is no fault


def test_a_prefill_that_does_not_end_is_begun_elsewhere() -> None:
    router = Router("p0", "p1", "d0")
    router.submit()
    router.handle(on.TicketGranted("d0", "r", b"t", 0))
    router.at(40.1)
    assert "prefill=p1" in router.route()
    assert router.policy.health.workers.known == ("p0",)


@pytest.mark.parametrize(
    ("progress", "code"), [(0, "reserve_timeout"), (1, "first_token_timeout"), (2, "stall_timeout")]
)
def test_with_nobody_else_a_late_stream_stays_and_ends_in_the_end(progress: int, code: str) -> None:
    router = Router("m0", "m1")
    router.submit()
    [prefill, decode] = [part.split("=")[1] for part in router.route().split(";")[:2]]
    if progress:
        router.handle(on.TicketGranted(decode, "r", b"t", 0))
    if progress > 1:
        router.first(prefill)
        router.token(decode, 1)
    for name in ("m0", "m1"):
        router.up(name, WorkerState.STARTING)  # alive, but not to be given anything
    before = list(router.said)
    limit = {0: 50.0, 1: 40.0, 2: 10.0}[progress]
    router.at(limit + 1.0)
    router.at(limit + 60.0)
    assert router.said == before
    router.at(limit + 60.1)
    assert router.error().code == code
    assert router.error().retry_after > 0
    assert not router.policy.live


def test_a_stream_that_waits_for_its_turn_with_nobody_else_waits_on() -> None:
    """Preempted on the only worker, say, whose blocks others need for long answers."""
    router = Router("m0")
    router.submit(prefer=LOCAL)
    router.first("m0")
    for second in range(1, 299):
        router.now = float(second)
        router.first("m0", "whoever")
        assert router.at(router.now) == []
    assert "r" in router.policy.live


def test_what_failed_on_one_worker_is_tried_on_another_first() -> None:
    router = Router("m0", "m1")
    router.submit(prefer=LOCAL)
    for attempt in ("r", "r~2"):
        failed_on = running_on(router)
        router.handle(on.RequestFailed(failed_on, attempt, "bad_luck", "again"))
        router.at(router.now + 1.0)
        assert running_on(router) not in ("", failed_on)


def test_who_leaves_need_not_compute_again_what_it_hands_over() -> None:
    router = handed_over()
    router.up("d0", WorkerState.DRAINING)
    assert router.route() == "prefill=d0;decode=d1;transport=shm"
    assert router.policy.loads()["d0"].prefill_tokens <= 16


def test_the_queue_has_an_end() -> None:
    router = handed_over()
    for name in ("p0", "d0", "d1"):
        router.handle(on.WorkerGone(name))
    router.at(60.0)
    assert "r" in router.policy.live
    router.at(60.1)
    assert (router.error().code, router.error().status) == ("queue_timeout", 503)
    assert "worker d1 was lost" in router.error().message


def test_what_fails_everywhere_for_no_known_reason_has_an_end() -> None:
    router = Router("m0", "m1")
    router.submit(prefer=LOCAL)
    while live := router.policy.live.get("r"):
        if name := running_on(router):
            router.handle(on.RequestFailed(name, live.attempt_id, "bad_luck", "again"))
        router.at(router.now + 0.5)
    assert 60.0 < router.now < 120.0
    assert (router.error().code, "again" in router.error().message) == ("queue_timeout", True)


@pytest.mark.parametrize(("timeout", "ends"), [(None, 300.0), (12.0, 12.0), (900.0, 300.0)])
def test_a_request_has_an_end_which_the_client_may_bring_forward(timeout: float | None, ends: float) -> None:
    router = Router("m0")
    router.submit(prefer=LOCAL, timeout=timeout)
    router.first("m0")
    for second in range(int(ends) + 1):
        router.now = float(second)
        router.token("m0", 1 + second)
        router.at(float(second))
    assert "r" in router.policy.live
    said = router.at(ends + 0.1)
    assert router.error().code == "request_timeout"
    assert do.AbortOn("m0", "r") in said


# what kills workers


def prove(router: Router) -> None:
    """Local canaries that are under way succeed."""
    for probe in router.canaries():
        token = TokenOutput(probe.request.request_id, 0, SampledToken(1), FinishReason.LENGTH)
        router.handle(on.FirstTokenMade(probe.worker_id, token, 0, 0.0, 0.0))


def running_on(router: Router, request_id: str = "r") -> str:
    live = router.policy.live[request_id]
    return live.route.decode if live.workers and live.route is not None else ""


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


# canaries


def test_a_worker_that_comes_back_proves_itself_first() -> None:
    router = Router("m0", "m1")
    router.handle(on.WorkerGone("m1"))
    router.now = 0.1
    router.up("m1")
    assert not router.canaries()  # not yet
    assert [worker.worker_id for worker in router.policy.serving()] == ["m0"]
    assert router.policy.wake_at(0.1) == 0.5
    router.at(0.5)
    [probe] = router.canaries()
    assert (probe.worker_id, probe.request.sampling.max_tokens) == ("m1", 1)
    assert (router.policy.live, router.policy.loads(), router.policy.is_needed("m1")) == ({}, {}, False)
    token = TokenOutput(probe.request.request_id, 0, SampledToken(1), FinishReason.LENGTH)
    assert router.handle(on.FirstTokenMade("m1", token, 0, 0.0, 0.0)) == []  # nobody receives it
    assert [worker.worker_id for worker in router.policy.serving()] == ["m0", "m1"]


@pytest.mark.parametrize("how", ["failed", "late"])
def test_a_probe_that_fails_is_repeated_later(how: str) -> None:
    router = Router("m0")
    router.handle(on.WorkerGone("m0"))
    router.up("m0")
    router.at(0.5)
    [probe] = router.canaries()
    if how == "failed":
        router.handle(on.RequestFailed("m0", probe.request.request_id, "engine_failed", "no"))
    else:
        assert do.AbortOn("m0", probe.request.request_id) in router.at(5.6)
    failed_at = router.now
    assert router.policy.wake_at(failed_at) == failed_at + 1.0
    router.at(failed_at + 1.0)
    assert len(router.canaries()) == 2


def test_a_pair_is_probed_with_a_token_that_needs_the_hand_off() -> None:
    router = Router("p0", "d0")
    router.submit()
    router.handle(on.RequestFailed("d0", "r", "kv_corrupt", "a page is wrong"))
    assert router.route() == "local=d0"
    router.at(0.5)
    [probe] = router.canaries()
    name = probe.request.request_id
    assert (probe.worker_id, probe.request.sampling.max_tokens) == ("d0", 2)
    assert isinstance(router.handle(on.TicketGranted("d0", name, b"t", 0))[0], do.StartPrefill)
    router.first("p0", name)
    assert router.policy.health.pairs.blocked() == {("p0", "d0")}
    router.token("d0", 1, name, last=True)
    assert router.policy.health.pairs.blocked() == frozenset()


def test_accepted_requests_wait_for_a_worker_on_probation() -> None:
    router = Router("m0")
    router.handle(on.WorkerGone("m0"))
    router.up("m0")
    router.submit(prefer=LOCAL)  # somebody is ready, so it is accepted
    assert not router.policy.live["r"].workers
    router.at(0.5)
    [probe] = router.canaries()
    token = TokenOutput(probe.request.request_id, 0, SampledToken(1), FinishReason.LENGTH)
    said = router.handle(on.FirstTokenMade("m0", token, 0, 0.0, 0.0))
    assert [type(action) for action in said] == [do.StartLocal]


# the two legs, and messages out of turn


@pytest.mark.parametrize("stage", ["reserved", "prefilling", "first token", "handed over"])
@pytest.mark.parametrize("end", ["cancel", "failure", "death", "timeout"])
@pytest.mark.parametrize("leg", ["p0", "d0"])
def test_either_leg_s_end_ends_the_other_at_once(stage: str, end: str, leg: str) -> None:
    router = Router("p0", "d0")
    router.submit()
    if stage != "reserved":
        router.handle(on.TicketGranted("d0", "r", b"t", 0))
    if stage in ("first token", "handed over"):
        router.first("p0")
    if stage == "handed over":
        router.token("d0", 1)
    match end:
        case "cancel":
            said = router.handle(on.RequestCancelled("r"))
        case "failure":
            said = router.handle(on.RequestFailed(leg, "r", "engine_corrupt", "nan"))
        case "death":
            said = router.handle(on.WorkerGone(leg))
        case _:
            said = router.at(300.1)
    aborted = {action.worker_id for action in said if isinstance(action, do.AbortOn)}
    over = {"p0"} if stage == "handed over" else set()  # its part is done
    if end in ("cancel", "timeout"):
        assert aborted == {"p0", "d0"} - over
    elif leg in over:
        assert aborted == set()  # and its end ends nothing
    else:
        assert aborted == {"p0", "d0"} - over - {leg}


def test_a_ticket_that_comes_twice_is_used_once_and_a_late_one_is_sent_back() -> None:
    router = Router("p0", "d0", "d1")
    router.submit()
    assert len(router.handle(on.TicketGranted("d0", "r", b"t", 0))) == 1
    assert router.handle(on.TicketGranted("d0", "r", b"t", 0)) == []
    assert router.handle(on.TicketGranted("d1", "r", b"t", 0)) == [do.AbortOn("d1", "r")]
    router.handle(on.RequestCancelled("r"))
    assert router.handle(on.TicketGranted("d0", "r", b"t", 0)) == [do.AbortOn("d0", "r")]
    assert router.policy.ignored == 3


def test_a_first_token_that_is_lost_with_its_worker_is_made_again() -> None:
    """The decode worker has gone on from it, but it never came to the router."""
    router = Router("p0", "d0")
    router.submit()
    router.handle(on.TicketGranted("d0", "r", b"t", 0))
    assert router.token("d0", 1) == []
    said = router.handle(on.WorkerGone("p0"))
    assert do.AbortOn("d0", "r") in said
    assert router.route() == "local=d0"


# leaving


def test_a_worker_that_leaves_keeps_what_cannot_move_for_a_while() -> None:
    router = Router("p0", "d0", "d1")
    router.submit()  # waits for its ticket
    router.up("d0", WorkerState.DRAINING)
    router.at(20.0)
    assert "decode=d0" in router.route()
    assert router.policy.is_needed("d0")
    router.at(20.1)
    assert "decode=d1" in router.route()
    assert not router.policy.is_needed("d0")


def test_a_worker_that_has_left_has_not_failed() -> None:
    router = handed_over()
    router.up("d0", WorkerState.DRAINING)
    assert router.route() == "prefill=d0;decode=d1;transport=shm"
    router.handle(on.WorkerGone("d0"))  # its grace was too short
    assert router.policy.live["r"].crashes == 0
    assert router.policy.health.workers.known == ()


# the budget


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
