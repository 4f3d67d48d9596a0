"""The router's shell: what `router.dispatch` and `router.fleet` do. All its actions are carried out in `_perform`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diptych.core import actions as do
from diptych.core import events as on
from diptych.core.fleet import Role, WorkerId, WorkerState, WorkerStats, WorkerView
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.recovery import RecoverySettings
from diptych.policy.routing import Routing
from diptych.sim import messages
from diptych.sim.checks import check_awaited
from diptych.sim.clients import Client
from diptych.sim.failures import check_failure
from diptych.sim.network import ROUTER, End, Pipe

if TYPE_CHECKING:
    from diptych.sim.life import Life
    from diptych.sim.world import World

SILENCE_SECONDS = 5.0  # as in router.fleet
BEAT_SECONDS = 1.0
CANARY_SECONDS = 12.0  # a canary has ended by then, if only by its deadline


@dataclass(slots=True, eq=False)
class Link:
    """One connected life, before and after it has registered."""

    life: Life
    down: Pipe
    state: WorkerState = WorkerState.READY
    stats: WorkerStats = field(default_factory=WorkerStats)
    silent_since: float | None = None

    def view(self) -> WorkerView:
        return self.life.view(self.state, self.stats)


class Router:
    """Policy, and the workers that have registered.

    Attributes:
        deserted: seconds, so far, during which no worker was ready.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.policy = RouterPolicy(Routing(), recovery=RecoverySettings(try_paths=True))
        self.links: dict[WorkerId, Link] = {}
        self.clock_ahead = 0.0
        self.deserted = 0.0
        self._deserted_since: float | None = None
        self._dead = False
        self._connected: list[Link] = []  # ever
        self._ended: list[Client] = []  # in the event at hand
        self._canary_until = 0.0
        self._beat_due = False
        self._wake_at: float | None = None

    def cancel(self, client: Client) -> None:
        """The client goes away."""
        self._ended.append(client)
        self.handle(on.RequestCancelled(client.request_id))

    def die(self) -> None:
        """It is gone, and all its connections end."""
        self._dead = True
        for link in self._connected:
            link.down.end()

    def connect(self, life: Life) -> None:
        """A life opens its connection and introduces itself."""
        network, name = self.world.network, life.worker_id
        down = network.pipe(ROUTER, name, lambda order: life.process.run(lambda: life.from_router(order)))
        link = Link(life, down)
        self._connected.append(link)
        up = life.to_router = network.pipe(name, ROUTER, lambda message: self._on_message(link, message))
        life.pipes_out.append(up)
        life.pipes_in.append(down)
        up.send(messages.Hello(life))
        life.watch_router()

    # workers

    def _on_message(self, link: Link, message: object) -> None:
        if self._dead:
            return
        if isinstance(message, messages.Hello):
            self._register(link)
        elif self.links.get(link.life.worker_id) is not link:
            return  # it has been given up
        elif isinstance(message, End):
            self._lost(link, "hangs up")
        elif isinstance(message, messages.Load):
            link.stats = message.stats
            self.handle(on.WorkerUpdated(link.view()))
        elif isinstance(message, messages.Leaving):
            link.state = WorkerState.DRAINING
            self.handle(on.WorkerUpdated(link.view()))
        else:
            self.handle(message)  # type: ignore[arg-type]  # the rest are events as they are

    def _register(self, link: Link) -> None:
        older = self.links.get(link.life.worker_id)
        if older is not None and older.life.epoch >= link.life.epoch:
            link.down.end()
            return
        if older is not None:
            self._lost(older, "is replaced by a newer life")
        self.world.tell("{} registers, with epoch {}", link.life.name, link.life.epoch)
        self.links[link.life.worker_id] = link
        self._introduce(link)
        self.handle(on.WorkerUpdated(link.view()))
        self.watch(link.life.worker_id)

    def _introduce(self, newcomer: Link) -> None:
        for link in self.links.values():
            for source, target in ((link, newcomer), (newcomer, link)):
                if source.life.spec.role is Role.PREFILL and target.life.spec.role is not Role.PREFILL:
                    source.down.send(messages.WarmUp(target.life))

    def _lost(self, link: Link, how: str) -> None:
        if self.links.get(link.life.worker_id) is link:
            del self.links[link.life.worker_id]
            link.down.end()
            self.world.tell("the router loses {}: it {}", link.life.name, how)
            self.world.losses += 1
            self.handle(on.WorkerGone(link.life.worker_id))

    def watch(self, worker_id: WorkerId) -> None:
        """To be called when it may have fallen silent, or be heard again. (Stands for pings and their answers, which
        take both directions.)"""
        link = self.links.get(worker_id)
        if link is None:
            return
        life = link.life
        cut = any(map(self.world.network.is_cut, ((worker_id, ROUTER), (ROUTER, worker_id))))
        heard = life.process.alive and not life.process.frozen and not cut
        if heard:
            link.silent_since = None
        elif link.silent_since is None:
            since = link.silent_since = self.world.kernel.now
            patience = SILENCE_SECONDS + BEAT_SECONDS * self.world.rng.random()
            self.world.kernel.after(patience, lambda: self._check_silence(link, since))

    def _check_silence(self, link: Link, since: float) -> None:
        if not self._dead and link.silent_since == since and self.links.get(link.life.worker_id) is link:
            link.state = WorkerState.LOST
            self.handle(on.WorkerUpdated(link.view()))
            self._lost(link, "has fallen silent")
            self.world.on_silent(link.life)

    # events and actions

    def handle(self, event: on.RouterEvent) -> None:
        """One event: decide, do."""
        self.world.count_event(ROUTER, event)
        self._count_deserted()
        for action in self.policy.handle(event, self.world.kernel.now + self.clock_ahead):
            self._perform(action)
        for link in self.links.values():
            if link.state is WorkerState.DRAINING and not self.policy.is_needed(link.life.worker_id):
                link.state = WorkerState.LOST
                link.down.send(messages.Shutdown())
        check_awaited(self)
        self._count_deserted()
        self._plan_ticks()
        while self._ended:
            client = self._ended.pop()
            for worker_id in sorted(client.workers):  # in an order that a seed fixes
                self._send(worker_id, messages.Over(client.request_id))

    def _count_deserted(self) -> None:
        now = self.world.kernel.now
        if self._deserted_since is not None:
            self.deserted += now - self._deserted_since
        ready = any(view.state is WorkerState.READY for view in self.policy.workers.values())
        self._deserted_since = None if ready else now

    def _plan_ticks(self) -> None:
        """A beat a second while anybody waits for anything, and one when policy has planned something."""
        kernel = self.world.kernel
        if not self._beat_due and (self.policy.live or kernel.now < self._canary_until):
            self._beat_due = True
            kernel.after(BEAT_SECONDS, self._beat)
        now = kernel.now + self.clock_ahead
        wake_at = self.policy.wake_at(now)
        if wake_at is not None and wake_at != self._wake_at:
            self._wake_at = wake_at
            kernel.after(wake_at - now, lambda: self._wake(wake_at))

    def _beat(self) -> None:
        self._beat_due = False
        if not self._dead:
            self.handle(on.Tick())

    def _wake(self, planned: float) -> None:
        if self._wake_at == planned and not self._dead:
            self._wake_at = None
            self.handle(on.Tick())

    def _perform(self, action: do.RouterAction) -> None:
        match action:
            case do.Deliver(output):
                client = self.world.clients[output.request_id]
                client.take(output)
                client.deserted_before = self.deserted
                if client.finished:
                    self._ended.append(client)
            case do.DeliverFailure(request_id, error):
                client = self.world.clients[request_id]
                self.world.tell("{} fails for its client: {} ({})", request_id, error.code, error.message)
                client.fail(error)
                self._ended.append(client)
                check_failure(self.world, client)
            case do.StartLocal(worker_id, request, outputs):
                self._attempt(request.request_id, f"is to be served by {worker_id} alone", outputs)
                self._order(worker_id, request.request_id, on.ServeRequested(request, outputs))
            case do.ReserveBlocks(worker_id, request, outputs):
                self._attempt(request.request_id, f"is to be split, with {worker_id} to decode", outputs)
                self._order(worker_id, request.request_id, on.ReserveRequested(request, outputs))
            case do.StartPrefill(worker_id, request, ticket, target, _, outputs):
                link = self.links.get(target)
                if link is not None:
                    self._order(worker_id, request.request_id, messages.Prefill(request, outputs, ticket, link.life))
            case do.AbortOn(worker_id, request_id):
                self._send(worker_id, on.AbortRequested(request_id))
            case _:
                raise TypeError(f"the router cannot {action}")

    def _attempt(self, attempt_id: str, how: str, outputs: tuple[int, ...]) -> None:
        client = self.world.client_of(attempt_id)
        if client is not None:
            client.begin_attempt(outputs)
        self.world.tell("{} {}, from token {} on", attempt_id, how, len(outputs))

    def _order(self, worker_id: WorkerId, attempt_id: str, message: object) -> None:
        """Have a worker begin with something."""
        client = self.world.client_of(attempt_id)
        if client is not None:
            client.workers[worker_id] = None
        else:
            self._canary_until = self.world.kernel.now + CANARY_SECONDS
        self._send(worker_id, message)

    def _send(self, worker_id: WorkerId, message: object) -> None:
        link = self.links.get(worker_id)
        if link is not None:
            link.down.send(message)
