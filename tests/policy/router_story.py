"""The router's policy alone: a test says what workers do, and what time it is."""

from __future__ import annotations

from diptych.core import actions as do
from diptych.core import events as on
from diptych.core.errors import UnavailableError
from diptych.core.fleet import Role, WorkerState, WorkerView
from diptych.core.request import FinishReason, Preference, Request, SampledToken, SamplingParams, TokenOutput
from diptych.policy.admission import AdmissionLimits
from diptych.policy.deadlines import Deadlines
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.recovery import RecoverySettings
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


def prove(router: Router) -> None:
    """Local canaries that are under way succeed."""
    for probe in router.canaries():
        token = TokenOutput(probe.request.request_id, 0, SampledToken(1), FinishReason.LENGTH)
        router.handle(on.FirstTokenMade(probe.worker_id, token, 0, 0.0, 0.0))


def running_on(router: Router, request_id: str = "r") -> str:
    live = router.policy.live[request_id]
    return live.route.decode if live.workers and live.route is not None else ""
