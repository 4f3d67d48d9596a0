"""The worker's loop: events in, `WorkerPolicy.handle`, actions out.

Everything runs on one asyncio loop except engine steps (`StepRunner`) and page transfers (`DataPlane`),
which have threads of their own and post their events here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from diptych.chaos.failpoints import failpoint
from diptych.core.actions import (
    AbandonPush,
    CloseHandoff,
    DropRow,
    ForgetRequest,
    GrantTicket,
    PushPages,
    RevokeTicket,
    RunStep,
    SendFailure,
    SendFirstToken,
    SendTokens,
    WorkerAction,
)
from diptych.core.clock import Clock
from diptych.core.errors import EngineLost
from diptych.core.events import Tick, WorkerEvent
from diptych.core.fleet import Manifest
from diptych.core.ports import Engine
from diptych.core.settings import WorkerSettings
from diptych.core.ticket import TicketClaims
from diptych.policy.data_parallel import DataParallelPolicy
from diptych.policy.worker import WorkerPolicy
from diptych.telemetry.journal import Journal
from diptych.wire import messages
from diptych.wire.channel import Channel
from diptych.wire.tickets import mint
from diptych.worker.data_plane import DataPlane
from diptych.worker.step_runner import StepRunner

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0  # deadlines
REPORT_SECONDS = 0.02  # how long a change of load may wait for others before it is reported

NONCE_BYTES = 16


class WorkerLoop:
    """Carries out what the policy of one worker decides."""

    def __init__(
        self,
        settings: WorkerSettings,
        policy: WorkerPolicy | DataParallelPolicy,
        engine: Engine,
        channel: Channel[messages.ToWorker],
        *,
        clock: Clock,
        journal: Journal,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._channel = channel
        self._clock = clock
        self._journal = journal
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._steps = StepRunner(engine, self._push_layer, self.post, self._engine_lost)
        self._data: DataPlane | None = None
        self._manifest: Manifest | None = None
        self._report_due = False
        self._last_stats = policy.stats()
        self._last_ping = 0

    def start(self, data: DataPlane, manifest: Manifest) -> None:
        """Begin. (The data plane posts its events here, so it is made after this object.)"""
        self._data, self._manifest = data, manifest
        self._steps.start()
        self._engine.watch(self._engine_lost)

    @property
    def data(self) -> DataPlane:
        if self._data is None:
            raise ValueError("the worker loop has not been started")
        return self._data

    @property
    def manifest(self) -> Manifest:
        if self._manifest is None:
            raise ValueError("the worker loop has not been started")
        return self._manifest

    def post(self, event: WorkerEvent) -> None:
        """Hand an event over, from any thread."""
        self._loop.call_soon_threadsafe(self.handle, event)

    def _engine_lost(self, error: EngineLost) -> None:
        """On any thread: this worker cannot go on. An error that escapes a callback ends it (`main.serve`)."""

        def fail() -> None:
            raise error

        self._loop.call_soon_threadsafe(fail)

    def handle(self, event: WorkerEvent) -> None:
        """One event: decide, record, do. On the loop's thread."""
        now = self._clock.now()
        actions = self._policy.handle(event, now)
        self._journal.record(now, event, actions)
        for action in actions:
            self._perform(action)
        if not self._report_due:
            self._report_due = True
            self._loop.call_later(REPORT_SECONDS, self._report)

    async def beat(self) -> None:
        """Tick for as long as the task lives."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.handle(Tick())

    def answer(self, ping: int) -> None:
        """The router wants a sign of life."""
        self._last_ping = ping
        self._send_heartbeat()

    def _send_heartbeat(self) -> None:
        self._last_stats = self._policy.stats()
        self._channel.send(messages.Heartbeat(self._last_stats, self._last_ping, self.data.turned_away))

    async def stop(self) -> bool:
        """Give up the running step, have the engine forget everybody, then close transfers. False if some source might
        still write to the KV memory."""
        for request_id in self._policy.request_ids:
            self._steps.forget(request_id)
        self._steps.end()
        await self._loop.run_in_executor(None, self._steps.join)
        return await self._loop.run_in_executor(None, self.data.close)

    def _report(self) -> None:
        """Tell the router about changed load and cached blocks."""
        self._report_due = False
        stored, evicted = self._policy.drain_cache_events()
        if stored or evicted:
            self._channel.send(messages.KVEvents(stored, evicted))
        if self._policy.stats() != self._last_stats:
            self._send_heartbeat()

    def _perform(self, action: WorkerAction) -> None:
        match action:
            case RunStep():
                self._steps.run(action)
            case DropRow(request_id):
                self._steps.drop((request_id,))
            case SendTokens(outputs):
                self._channel.send(messages.Tokens(list(outputs)))
            case SendFirstToken(output, cached, queue_seconds, prefill_seconds):
                failpoint("first_token.made")
                self._channel.send(messages.Prefilled(output, cached, queue_seconds, prefill_seconds))
                failpoint("first_token.sent")
            case SendFailure(request_id, code, message):
                self._channel.send(messages.Failed(request_id, code, message))
            case PushPages(request_id, claims, plan):
                self.data.push(request_id, claims, plan, list(dict.fromkeys(part.layer for part in plan.layers)))
            case CloseHandoff(request_id, claims, token):
                self.data.close_handoff(request_id, claims, token)
            case AbandonPush(request_id, claims):
                self.data.abandon(request_id, claims)
            case GrantTicket():
                self._grant(action, self.manifest)
            case RevokeTicket(request_id):
                self.data.revoke(request_id)
            case ForgetRequest(request_id):
                failpoint("request.over")
                self._steps.forget(request_id)

    def _push_layer(self, push: PushPages, layer: int) -> None:
        """On the compute thread: this layer is computed, its pages may leave."""
        self.data.push(push.request_id, push.claims, push.plan, [layer])

    def _grant(self, grant: GrantTicket, manifest: Manifest) -> None:
        claims = TicketClaims(
            request_id=grant.request.request_id,
            worker_id=self._settings.worker_id,
            epoch=self._settings.epoch,
            blocks=grant.blocks,
            first_block=grant.first_block,
            num_tokens=grant.num_tokens,
            layout=manifest.layout,
            data_rank=grant.data_rank,
            model_digest=manifest.model.digest,
            salt=grant.request.cache_salt,
            nonce=secrets.token_bytes(NONCE_BYTES),
        )
        self.data.expect(claims)
        ticket = mint(claims, self._settings.key)
        failpoint("ticket.minted")
        self._channel.send(messages.Granted(claims.request_id, ticket, grant.num_cached_tokens))
