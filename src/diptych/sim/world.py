"""One history: a scenario, played out to its end."""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from diptych.core.events import RequestSubmitted
from diptych.core.fleet import Epoch
from diptych.core.ticket import TicketClaims
from diptych.sim.checks import check_empty, check_ended
from diptych.sim.clients import Client
from diptych.sim.faults import strike
from diptych.sim.kernel import Kernel
from diptych.sim.life import Life, Segments
from diptych.sim.network import Network
from diptych.sim.router import Router
from diptych.sim.scenario import FaultKind, RequestSpec, Scenario, WorkerSpec
from diptych.sim.story import Story
from diptych.sim.violation import Violation

LOAD_SECONDS = 0.05  # until a worker of the first hour connects
RESTART_SECONDS = 1.0  # about what a worker takes to come back by itself
PATIENCE_SECONDS = 60.0  # after the last fault and the last request, and what computing takes, no request is left
REST_SECONDS = 120.0  # after that, nothing happens any more


@dataclass(slots=True)
class Outcome:
    """What came of one history."""

    scenario: Scenario
    events: int = 0  # that policies handled
    seconds: float = 0.0  # of virtual time
    finished: int = 0  # requests
    failed: Counter[str] = field(default_factory=Counter)  # requests, by error code
    attempts: int = 0  # that requests took
    retried: int = 0  # attempts after the first
    handoffs: int = 0  # that succeeded
    rows_dropped: int = 0  # out of running steps
    faults: Counter[FaultKind] = field(default_factory=Counter)  # that struck
    violation: str | None = None


class World:
    """Everything there is in one history."""

    def __init__(self, scenario: Scenario, story: Story | None = None) -> None:
        self.scenario = scenario
        self.rng = random.Random(scenario.seed)
        self.kernel = Kernel()
        self.network = Network(self.kernel, self.rng, scenario.latency)
        self.story = story
        self.clients = {spec.request.request_id: Client(spec, scenario.model) for spec in scenario.requests}
        self.lives: dict[str, Life] = {}
        self.router = Router(self)
        self.outcome = Outcome(scenario)
        self.losses = 0  # of workers, to the router
        self._tickets: dict[bytes, TicketClaims] = {}
        self._last_epoch: Epoch = 0
        self._healed_at = 0.0
        steps = sum(
            len(spec.request.prompt_token_ids) // 4 + len(self.clients[spec.request.request_id].right)
            for spec in scenario.requests
        )
        self._work_seconds = 2 * steps * scenario.cost.step  # if a single worker does it all, one after the other
        self._by_event = {fault.after_event: fault for fault in scenario.faults if fault.after_event is not None}
        for spec in scenario.workers:
            self.kernel.after(LOAD_SECONDS * self.rng.random(), partial(self._start, spec, Segments()))
        for request in scenario.requests:
            self.kernel.after(request.at, partial(self._submit, request))
        for fault in scenario.faults:
            if fault.after_event is None:
                self.kernel.after(fault.at, partial(strike, self, fault))

    def run(self) -> Outcome:
        """Play it to its end, or to the first violation."""
        outcome = self.outcome
        try:
            while self.kernel.step():
                late = self.kernel.now - self._healed_at - PATIENCE_SECONDS - self._work_seconds
                if late > 0:
                    check_ended(self)
                if late > REST_SECONDS:
                    check_empty(self)
                    raise Violation("things still happen long after everything should be over")
            check_ended(self)
            check_empty(self)
        except Violation as violation:
            outcome.violation = str(violation)
        except Exception:  # whatever policy raises is a find, too
            outcome.violation = traceback.format_exc(limit=-3)
        outcome.seconds = self.kernel.now
        outcome.finished = sum(client.finished for client in self.clients.values())
        outcome.failed.update(client.error.code for client in self.clients.values() if client.error is not None)
        attempts = [client.attempts for client in self.clients.values() if client.attempts]
        outcome.attempts, outcome.retried = sum(attempts), sum(attempts) - len(attempts)
        return outcome

    # the story

    def tell(self, text: str, *details: object) -> None:
        """Write a line, if anybody is going to read it."""
        if self.story is not None:
            self.story.add(self.kernel.now, text.format(*details))

    def count_event(self, name: str, event: object) -> None:
        """A policy is about to handle an event; some faults wait for just that."""
        self.outcome.events += 1
        if self.story is not None:
            self.story.add_event(self.kernel.now, name, event)
        fault = self._by_event.get(self.outcome.events)
        if fault is not None:
            self.kernel.after(0.0, lambda: strike(self, fault))

    def count_fault(self, kind: FaultKind) -> None:
        self.outcome.faults[kind] += 1
        self._healed_at = max(self._healed_at, self.kernel.now)

    # clients

    def _submit(self, spec: RequestSpec) -> None:
        self._healed_at = max(self._healed_at, self.kernel.now)
        request = spec.request
        self.tell("{} arrives: {} tokens", request.request_id, len(request.prompt_token_ids))
        client = self.clients[request.request_id]
        client.submitted, client.deserted_before = True, self.router.deserted
        self.router.handle(RequestSubmitted(request))
        if spec.cancel_after is not None:
            self.kernel.after(spec.cancel_after, lambda: self._cancel(request.request_id))

    def _cancel(self, request_id: str) -> None:
        client = self.clients[request_id]
        if not client.over:
            self.tell("the client of {} goes away", request_id)
            client.cancelled = True
        self.router.cancel(client)

    def client_of(self, attempt_id: str) -> Client | None:
        """Whose stream an attempt is about; None for a canary. (Attempts after the first are called ID~NUMBER.)"""
        return self.clients.get(attempt_id.partition("~")[0])

    def hit(self, attempt_ids: Iterable[str], life: Life) -> None:
        """A fault of an engine concerns these."""
        names = list(attempt_ids)
        life.tell("has an engine fault in a step with {}", ", ".join(names))
        for client in map(self.client_of, names):
            if client is not None:
                client.engine_faults += 1

    def restart_router(self) -> None:
        """The router dies, and with it every stream; another one takes its place, and knows nothing."""
        for client in self.clients.values():
            if client.submitted and not client.over:
                client.cut_off = True
        names = ", ".join(client.request_id for client in self.clients.values() if client.cut_off)
        self.tell("the router dies, and a new one takes its place; streams cut off so far: {}", names or "none")
        self.router.die()
        self.router = Router(self)

    # tickets

    def minted(self, claims: TicketClaims) -> bytes:
        """The ticket, opaque, for these claims."""
        self._tickets[claims.nonce] = claims
        return claims.nonce

    def opened(self, ticket: bytes) -> TicketClaims:
        return self._tickets[ticket]

    # lives

    def _start(self, spec: WorkerSpec, segments: Segments) -> None:
        self._last_epoch += 1
        life = self.lives[spec.worker_id] = Life(self, spec, self._last_epoch, segments)
        self.router.connect(life)

    def _restart(self, spec: WorkerSpec, seconds: float, segments: Segments) -> None:
        self.until_healed(seconds, lambda: self._start(spec, segments))

    def kill(self, life: Life, restart_after: float) -> None:
        """SIGKILL; somebody starts it again."""
        life.die()
        self.router.watch(life.worker_id)
        self._restart(life.spec, restart_after, Segments())

    def on_silent(self, life: Life) -> None:
        """The router has given a life up: a supervisor makes sure that it is over."""
        if life.spec.supervised and life.process.alive:
            life.tell("is killed by its supervisor")
            self.kill(life, RESTART_SECONDS)

    def life_over(self, life: Life) -> None:
        """It has ended in good order."""
        segments = Segments() if life.spec.supervised else life.segments
        self._restart(life.spec, RESTART_SECONDS * (0.5 + self.rng.random()), segments)

    def until_healed(self, seconds: float, heal: Callable[[], None]) -> None:
        """Plan the end of a fault; everything must be well some time after the last of them."""
        self._healed_at = max(self._healed_at, self.kernel.now + seconds)
        self.kernel.after(seconds, heal)
