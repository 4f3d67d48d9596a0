"""The router's shell: requests and worker messages in, `RouterPolicy.handle`, actions out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from diptych.chaos.failpoints import failpoint
from diptych.core.actions import (
    AbortOn,
    Deliver,
    DeliverFailure,
    ReserveBlocks,
    RouterAction,
    StartLocal,
    StartPrefill,
)
from diptych.core.clock import Clock
from diptych.core.errors import DiptychError, HandshakeError, PeerError, ProtocolError, UnavailableError
from diptych.core.events import (
    BlocksCached,
    FirstTokenMade,
    RequestCancelled,
    RequestFailed,
    RequestSubmitted,
    RouterEvent,
    Tick,
    TicketGranted,
    TokensMade,
    WorkerGone,
    WorkerUpdated,
)
from diptych.core.fleet import ModelInfo, Readiness, Role, RouterStats, WorkerId, WorkerState, WorkerView
from diptych.core.request import Request, TokenOutput
from diptych.policy.admission import RESTART_SECONDS
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.pulse import Pulse
from diptych.router.fleet import FleetRegistry, WorkerLink
from diptych.router.stream import RequestStream
from diptych.telemetry.journal import Journal
from diptych.wire import messages
from diptych.wire.channel import Channel

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
HELLO_SECONDS = 120.0  # between messages, while a worker loads its model


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetCallbacks:
    """What the router tells whoever supervises the workers, if anybody does.

    `on_loading(worker_id, done, total)` while a worker loads its model, `on_joined` when it has
    registered, `on_silent` when it has not answered for too long.
    """

    on_loading: Callable[[WorkerId, int, int], None] = lambda worker_id, done, total: None
    on_joined: Callable[[WorkerId], None] = lambda worker_id: None
    on_silent: Callable[[WorkerId], None] = lambda worker_id: None


class Router:
    """Implements core.ports.Dispatcher over a fleet of workers, of which `expected` are to come."""

    def __init__(
        self,
        policy: RouterPolicy,
        clock: Clock,
        journal: Journal,
        *,
        expected: dict[WorkerId, Role],
        callbacks: FleetCallbacks | None = None,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._journal = journal
        self._expected = expected
        self._callbacks = callbacks or FleetCallbacks()
        self._fleet = FleetRegistry()
        self._streams: dict[str, RequestStream] = {}
        self._pulse = Pulse(BEAT_SECONDS, clock.now())
        self._wake: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()  # no client's request is live
        self._idle.set()
        self._draining = False
        self._readiness = Readiness.NO  # at the last beat

    # for the front (core.ports.Dispatcher)

    @property
    def model(self) -> ModelInfo:
        """Raises UnavailableError until the first worker has registered."""
        if self._fleet.manifest is None:
            raise UnavailableError("no worker has registered yet", retry_after=1.0)
        return self._fleet.manifest.model

    def check(self, tenant: str) -> None:
        """Raises OverloadedError or UnavailableError if no request of this tenant would be accepted."""
        self._check_not_ending()
        error = self._policy.check(tenant)
        if error is not None:
            raise error

    def submit(self, request: Request) -> RequestStream:
        """Accept a request. Raises OverloadedError or UnavailableError."""
        self._check_not_ending()
        actions = self._decide(RequestSubmitted(request))
        live = self._policy.live.get(request.request_id)
        if live is None:
            raise next(action.error for action in actions if isinstance(action, DeliverFailure))
        stream = RequestStream(live, self._cancel)
        self._streams[request.request_id] = stream
        failpoint("request.admitted")
        self._carry_out(actions)
        return stream

    def workers(self) -> list[WorkerView]:
        """Those that have registered, and those that are expected to."""
        views = [link.view() for link in self._fleet.links.values()]
        missing = [
            WorkerView(worker_id=worker_id, role=role, state=WorkerState.STARTING, epoch=0)
            for worker_id, role in self._expected.items()
            if worker_id not in self._fleet.links
        ]
        return sorted(views + missing, key=lambda view: view.worker_id)

    def stats(self) -> RouterStats:
        return self._policy.stats(self._clock.now())

    def alive(self) -> bool:
        return self._clock.now() - self._pulse.last < 5 * BEAT_SECONDS

    def readiness(self) -> Readiness:
        """What policy says of the fleet, unless the server is about to end."""
        return Readiness.NO if self._draining else self._policy.readiness()

    def _check_not_ending(self) -> None:
        if self._draining:
            raise UnavailableError("the server is about to end", retry_after=RESTART_SECONDS, code="draining")

    # for the composition

    async def drain(self, seconds: float) -> bool:
        """Accept nothing more, and wait for what runs. False if it did not all end in time."""
        self._draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def end_requests(self) -> None:
        """Accept nothing more, and end what still runs: clients are told, and workers let go of it."""
        self._draining = True
        error = UnavailableError("the server ended before the answer did", retry_after=RESTART_SECONDS, code="draining")
        for request_id in list(self._streams):
            self._deliver(request_id, error, last=True)
            self._cancel(request_id)

    # for the workers

    async def on_channel(self, channel: Channel[messages.FromWorker]) -> None:
        """Serve one worker's connection until it ends. An outsider's or a broken peer's costs only itself."""
        link = await self._register(channel)
        if link is None:
            return
        try:
            async for message in channel:
                if not self._fleet.has(link):
                    break  # this life is over: what was still under way means nothing
                self._on_message(link, message)
        except PeerError as error:
            log.warning("worker %s broke the protocol: %s", link.worker_id, error)
        finally:
            self._lost(link)

    async def _register(self, channel: Channel[messages.FromWorker]) -> WorkerLink | None:
        try:
            hello = await self._hello(channel)
            older = self._fleet.admit(hello)
        except StopAsyncIteration:
            return None  # it ended before it was ready; its supervisor says why
        except (PeerError, TimeoutError) as error:
            reason = str(error) or f"it did not introduce itself within {HELLO_SECONDS:.0f} s"
            if isinstance(error, ProtocolError):
                reason += f" (this router speaks wire version {messages.WIRE_VERSION}; another version of diptych?)"
            log.warning("a worker was refused: %s", reason)
            channel.send(messages.Refused(reason))
            channel.close()
            return None
        if older is not None:
            older.channel.send(messages.Refused(f"a newer life of worker {older.worker_id} has registered"))
            self._lost(older)
        link = WorkerLink(hello, channel, self._clock.now())
        self._fleet.add(link)
        channel.send(messages.Welcome(messages.WIRE_VERSION))
        self._introduce(link)
        self._handle(WorkerUpdated(link.view()))
        self._callbacks.on_joined(link.worker_id)
        return link

    async def _hello(self, channel: Channel[messages.FromWorker]) -> messages.Hello:
        """Wait for a worker to load and introduce itself. Raises HandshakeError, TimeoutError, StopAsyncIteration."""
        incoming = aiter(channel)
        while True:
            async with asyncio.timeout(HELLO_SECONDS):
                message = await anext(incoming)
            match message:
                case messages.Hello():
                    return message
                case messages.WantEpoch(worker_id, above):
                    if worker_id in self._expected:
                        raise HandshakeError(f"{worker_id} is the name of a worker of the server's own; choose another")
                    channel.send(messages.NewEpoch(self._fleet.next_epoch(above)))
                case messages.Loading(worker_id, done, total):
                    self._callbacks.on_loading(worker_id, done, total)
                case _:
                    raise HandshakeError(f"expected a hello, got {type(message).__name__}")

    def _introduce(self, newcomer: WorkerLink) -> None:
        """Have prefill workers open their data connections before the first request needs them."""
        for link in self._fleet.links.values():
            for source, target in ((link, newcomer), (newcomer, link)):
                if source.hello.role is not Role.PREFILL or target.hello.role is Role.PREFILL:
                    continue
                transport = self._policy.transport(source.view(), target.view())
                endpoint = target.endpoint(transport) if transport is not None else None
                if endpoint is not None:
                    source.channel.send(messages.WarmUp(target.worker_id, target.hello.epoch, endpoint))

    def _lost(self, link: WorkerLink) -> None:
        link.channel.close()
        if self._fleet.remove(link):
            self._handle(WorkerGone(link.worker_id))

    def _on_message(self, link: WorkerLink, message: messages.FromWorker) -> None:
        worker_id = link.worker_id
        match message:
            case messages.Tokens(outputs):
                self._handle(TokensMade(worker_id, tuple(outputs)))
            case messages.Prefilled(output, cached, queue_seconds, prefill_seconds):
                self._handle(FirstTokenMade(worker_id, output, cached, queue_seconds, prefill_seconds))
            case messages.Granted(request_id, ticket, cached):
                self._handle(TicketGranted(worker_id, request_id, ticket, cached))
            case messages.Failed(request_id, code, text):
                log.info("worker %s could not go on with %s: %s (%s)", worker_id, request_id, text, code)
                self._handle(RequestFailed(worker_id, request_id, code, text))
            case messages.KVEvents(stored, evicted):
                self._handle(BlocksCached(worker_id, tuple(stored), tuple(evicted)))
            case messages.Heartbeat():
                link.on_heartbeat(message)
                self._handle(WorkerUpdated(link.view()))
            case messages.Leaving():
                link.state = WorkerState.DRAINING
                self._handle(WorkerUpdated(link.view()))
            case _:
                log.warning("worker %s sent a %s out of turn", worker_id, type(message).__name__)

    # the loop's own

    async def beat(self) -> None:
        """Watch the fleet for as long as the task lives."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            self.on_beat()

    def on_beat(self) -> None:
        """The loop is alive: look at the time, unless it was the router itself that stood still. What the others have
        sent meanwhile is then still unread."""
        now = self._clock.now()
        if self._pulse.beat(now):
            self.check_time()
        else:
            self._fleet.excuse(now)
        for link in self._fleet.links.values():
            link.ping(now)
        self._log_readiness()

    def _log_readiness(self) -> None:
        """Say so if no KV can be handed over, and when that is over."""
        before, self._readiness = self._readiness, self.readiness()
        if self._readiness is before:
            return
        if self._readiness is Readiness.DEGRADED:
            log.warning("%s", self._readiness.reason)
        elif before is Readiness.DEGRADED and self._readiness is Readiness.YES:
            log.warning("KV is handed over again")

    def check_time(self) -> None:
        """Workers that have not answered for too long are lost; streams that wait for too long go elsewhere."""
        silent = self._fleet.silent(self._clock.now())
        for link in silent:
            link.state = WorkerState.LOST
            self._handle(WorkerUpdated(link.view()))  # of all of them first, so that none gets another's streams
        for link in silent:
            log.warning("worker %s has fallen silent", link.worker_id)
            self._callbacks.on_silent(link.worker_id)
            self._lost(link)
        self._handle(Tick())

    def shutdown(self) -> None:
        """Tell every worker to end."""
        for link in self._fleet.links.values():
            link.channel.send(messages.Shutdown())

    def _cancel(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._handle(RequestCancelled(request_id))

    def _handle(self, event: RouterEvent) -> None:
        self._carry_out(self._decide(event))
        self._release_drained()

    def _decide(self, event: RouterEvent) -> list[RouterAction]:
        now = self._clock.now()
        actions = self._policy.handle(event, now)
        if actions or not isinstance(event, Tick):  # a tick that changes nothing is not worth a line
            self._journal.record(now, event, actions)
        return actions

    def _carry_out(self, actions: list[RouterAction]) -> None:
        for action in actions:
            self._perform(action)
        if self._policy.live:
            self._idle.clear()
        else:
            self._idle.set()
        self._set_alarm()

    def _set_alarm(self) -> None:
        """Have the policy's next plan carried out when its time comes."""
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        now = self._clock.now()
        wake_at = self._policy.wake_at(now)
        if wake_at is not None:
            self._wake = asyncio.get_running_loop().call_later(wake_at - now, self._handle, Tick())

    def _release_drained(self) -> None:
        """Let workers go that want to leave and are not needed any more."""
        for link in self._fleet.draining():
            if not self._policy.is_needed(link.worker_id):
                link.state = WorkerState.LOST
                link.channel.send(messages.Shutdown())

    def _perform(self, action: RouterAction) -> None:
        match action:
            case Deliver(output):
                self._deliver(output.request_id, output, last=output.finish is not None)
            case DeliverFailure(request_id, error):
                self._deliver(request_id, error, last=True)
            case StartLocal(worker_id, request, outputs):
                self._send(worker_id, messages.Serve(request, outputs))
            case ReserveBlocks(worker_id, request, outputs):
                self._send(worker_id, messages.Reserve(request, outputs))
            case StartPrefill():
                self._start_prefill(action)
            case AbortOn(worker_id, request_id):
                self._send(worker_id, messages.Abort(request_id))
            case _:
                assert_never(action)

    def _deliver(self, request_id: str, item: TokenOutput | DiptychError, *, last: bool) -> None:
        stream = self._streams.pop(request_id, None) if last else self._streams.get(request_id)
        if stream is not None:
            if last:
                failpoint("stream.ending")
            stream.put(item)

    def _start_prefill(self, start: StartPrefill) -> None:
        target = self._fleet.links.get(start.target)
        endpoint = target.endpoint(start.transport) if target is not None else None
        if endpoint is None:
            return  # the target has just gone: its WorkerGone ends this request
        order = messages.Prefill(start.request, start.output_token_ids, start.ticket, endpoint)
        self._send(start.worker_id, order)

    def _send(self, worker_id: WorkerId, message: messages.ToWorker) -> None:
        """Workers that are gone get nothing: their WorkerGone ends what they were to do."""
        link = self._fleet.links.get(worker_id)
        if link is not None:
            link.channel.send(message)
