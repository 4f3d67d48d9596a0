"""One life (epoch) of one worker: its policy, and everything that its shell does.

What `worker.loop`, `worker.data_plane`, `worker.step_runner` and `worker.main` do with sockets and threads is done
here by planning it. All worker actions are carried out in `_perform`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING

from diptych.core import actions as do
from diptych.core import events as on
from diptych.core.errors import EngineCorrupt, ServingError
from diptych.core.fleet import Epoch, WorkerState, WorkerStats, WorkerView
from diptych.core.kv_layout import LayerTransfer, PrivateMemory
from diptych.core.ports import AllocateKV
from diptych.core.ticket import TicketClaims
from diptych.engine.scripted import ScriptedEngine
from diptych.policy.batching import BatchLimits
from diptych.policy.block_pool import BlockPool
from diptych.policy.data_parallel import DataParallelPolicy
from diptych.policy.worker import WorkerPolicy
from diptych.sim import frames, messages
from diptych.sim.checks import Place, check_grant, check_over, check_step, check_tickets
from diptych.sim.kernel import Process
from diptych.sim.network import ROUTER, End, Pipe
from diptych.sim.push_link import PushLink
from diptych.sim.receiver import Receiver
from diptych.sim.scenario import FaultKind, Spoil, WorkerSpec
from diptych.sim.unwanted import PlannedUnwanted

if TYPE_CHECKING:
    from diptych.sim.world import World

TICK_SECONDS = 1.0
TOO_LATE_SHARE = 0.2  # of rows that are to be dropped: the engine has them in the step to its end
SILENCE_SECONDS = 20.0  # as in worker.router_watch


class Segments:
    """The memory of one process, which outlasts a life in it."""

    def __init__(self) -> None:
        self._made: list[PrivateMemory] = []

    def allocator(self) -> AllocateKV:
        """For an engine: gives new memory the first time, and the same again to a later one."""
        known = iter(tuple(self._made))

        def allocate(nbytes: int) -> PrivateMemory:
            memory = next(known, None)
            if memory is None:
                memory = PrivateMemory(nbytes)
                self._made.append(memory)
            return memory

        return allocate


class Life:
    """From joining the router until it ends, is ended, or learns that the router has given it up."""

    def __init__(self, world: World, spec: WorkerSpec, epoch: Epoch, segments: Segments) -> None:
        self.world, self.spec, self.epoch, self.segments = world, spec, epoch, segments
        self.process = Process()
        self.killed = False
        self.closing = False
        self.clock_ahead = 0.0
        self.pipes_in: list[Pipe] = []
        self.pipes_out: list[Pipe] = []
        self.to_router: Pipe | None = None
        self.links: dict[str, PushLink] = {}
        self.old_links: list[PushLink] = []
        self.next_step_fault: FaultKind | None = None
        self.spoils: list[Spoil] = []
        scenario = world.scenario
        self.engine = ScriptedEngine(spec.cut(scenario.model), scenario.cost)
        self.memories = self.engine.allocate_kv(spec.num_blocks, segments.allocator())
        limits = BatchLimits(scenario.max_batch_tokens, scenario.max_sequences)
        self.ranks = [self._rank(number, limits) for number in range(self.engine.layout.data_parallel)]
        self.policy = self.ranks[0] if len(self.ranks) == 1 else DataParallelPolicy(self.ranks)
        self.receiver = Receiver(self)
        self.reading: dict[int, tuple[str, set[Place]]] = {}  # what queued pushes still have to read
        self.salts: dict[Place, str] = {}  # whose pages they are: of which tenant
        self._readings = count()
        self._step_running = False  # the engine computes
        self._dropped: list[str] = []  # rows of that step
        self._in_flight = False  # policy waits for the outcome of a step
        self._ended: list[str] = []  # requests about which the router has said everything
        self._tick_due = self._report_due = False
        self._last_stats = WorkerStats()
        self._deaf_since: float | None = None

    def _rank(self, data_rank: int, limits: BatchLimits) -> WorkerPolicy:
        layout, eos = self.engine.layout, self.engine.model.eos_token_ids
        pool = BlockPool(self.spec.num_blocks, layout.block_size)
        timeout = self.world.scenario.handoff_timeout
        return WorkerPolicy(layout, pool, limits, eos, handoff_timeout=timeout, data_rank=data_rank)

    @property
    def blocks_used(self) -> int:
        return sum(rank.pool.num_used for rank in self.ranks)

    @property
    def worker_id(self) -> str:
        return self.spec.worker_id

    @property
    def name(self) -> str:
        return self.spec.worker_id

    @property
    def accepts(self) -> bool:
        """It listens for data connections."""
        return self.process.alive and not self.closing

    def tell(self, text: str, *details: object) -> None:
        """A line of the story about this life."""
        if self.world.story is not None:
            self.world.tell("{} " + text, self.name, *details)

    def view(self, state: WorkerState, stats: WorkerStats) -> WorkerView:
        layout = self.engine.layout
        return WorkerView(
            worker_id=self.worker_id,
            role=self.spec.role,
            state=state,
            epoch=self.epoch,
            num_blocks=self.spec.num_blocks * len(self.ranks),
            block_size=layout.block_size,
            token_bytes=layout.token_bytes,
            transports=("shm", "tcp"),
            host=self.spec.host,
            stats=stats,
        )

    # events

    def post(self, event: on.WorkerEvent) -> None:
        """Hand an event over from a thread of the data plane or the engine."""
        self.world.kernel.after(self.world.scenario.post_seconds, lambda: self.process.run(lambda: self.handle(event)))

    def handle(self, event: on.WorkerEvent) -> None:
        """One event: decide, do, check."""
        if self.closing:
            return
        world = self.world
        world.count_event(self.name, event)
        actions = self.policy.handle(event, world.kernel.now + self.clock_ahead)
        step_over = isinstance(event, on.StepFinished | on.StepFailed)
        if step_over:
            self._in_flight = False
        for action in actions:
            self._perform(action)
        self.policy.check_integrity()
        check_tickets(self)
        if step_over:
            self._check_over()
        if not self._report_due:
            self._report_due = True
            world.kernel.after(world.scenario.report_seconds, lambda: self.process.run(self._report))
        if not self._tick_due and not self.policy.idle:
            self._tick_due = True
            world.kernel.after(TICK_SECONDS, lambda: self.process.run(self._tick))

    def _tick(self) -> None:
        self._tick_due = False
        self.handle(on.Tick())

    def _report(self) -> None:
        """Tell the router about changed load and cached blocks."""
        self._report_due = False
        stored, evicted = self.policy.drain_cache_events()
        if stored or evicted:
            self._to_router(on.BlocksCached(self.worker_id, tuple(stored), tuple(evicted)))
        stats = self.policy.stats()
        if stats != self._last_stats:
            self._last_stats = stats
            self._to_router(messages.Load(stats))

    def _to_router(self, message: object) -> None:
        if self.to_router is not None:
            self.to_router.send(message)

    def from_router(self, message: object) -> None:
        """An order, or the end of the connection."""
        if self.closing:
            return
        match message:
            case messages.Prefill(request, outputs, ticket, target):
                self._open_link(target)
                self.handle(on.PrefillRequested(request, self.world.opened(ticket), outputs))
            case messages.WarmUp(target):
                self._open_link(target)
            case messages.Shutdown():
                self.tell("is told to end")
                self.close()
            case messages.Over(request_id):
                self._ended.append(request_id)
                if not self._in_flight:
                    self._check_over()
            case End():
                self.tell("finds that the router has given it up")
                self.close()
            case on.ServeRequested() | on.ReserveRequested() | on.AbortRequested():
                self.handle(message)
            case _:
                raise TypeError(f"the router said {message}")

    def watch_router(self) -> None:
        """To be called when the router may have fallen silent, or be heard again. (Stands for its pings.)"""
        kernel = self.world.kernel
        if not self.world.network.is_cut((ROUTER, self.worker_id)):
            self._deaf_since = None
        elif self._deaf_since is None:
            since = self._deaf_since = kernel.now
            patience = SILENCE_SECONDS + TICK_SECONDS * self.world.rng.random()
            kernel.after(patience, lambda: self.process.run(lambda: self._check_router(since)))

    def _check_router(self, since: float) -> None:
        if self._deaf_since == since and not self.closing:
            self.tell("gives the router up, which has fallen silent")
            self.close()

    def _check_over(self) -> None:
        """What is over is over, at the latest after the step that it takes part in."""
        if self._ended:
            check_over(self, self._ended)
            self._ended.clear()

    # actions

    def _perform(self, action: do.WorkerAction) -> None:
        match action:
            case do.RunStep():
                check_step(self, action)
                self._run(action)
            case do.DropRow(request_id):
                self._drop(request_id)
            case do.SendTokens(outputs):
                self._to_router(on.TokensMade(self.worker_id, outputs))
            case do.SendFirstToken(output, cached, queue_seconds, prefill_seconds):
                self._to_router(on.FirstTokenMade(self.worker_id, output, cached, queue_seconds, prefill_seconds))
            case do.SendFailure(request_id, code, message):
                self.tell("fails {}: {} ({})", request_id, code, message)
                self._to_router(on.RequestFailed(self.worker_id, request_id, code, message))
            case do.PushPages(request_id, claims, plan):
                for layer in dict.fromkeys(transfer.layer for transfer in plan.layers):
                    self._link(claims).push(request_id, claims, plan, layer)
            case do.CloseHandoff(request_id, claims, token):
                self._link(claims).close_handoff(request_id, claims, token)
            case do.AbandonPush(request_id, claims):
                self._link(claims).abandon(request_id, claims)
            case do.GrantTicket():
                self._grant(action)
            case do.RevokeTicket(request_id):
                self.receiver.revoke(request_id)
            case do.ForgetRequest():
                pass
            case _:
                raise TypeError(f"a worker cannot {action}")

    def _grant(self, grant: do.GrantTicket) -> None:
        claims = TicketClaims(
            request_id=grant.request.request_id,
            worker_id=self.worker_id,
            epoch=self.epoch,
            blocks=grant.blocks,
            first_block=grant.first_block,
            num_tokens=grant.num_tokens,
            layout=self.engine.layout,
            model_digest=self.engine.model.digest,
            salt=grant.request.cache_salt,
            data_rank=grant.data_rank,
            nonce=self.world.rng.randbytes(16),
        )
        self.receiver.expect(claims)
        check_grant(self, claims)
        ticket = self.world.minted(claims)
        self._to_router(on.TicketGranted(self.worker_id, claims.request_id, ticket, grant.num_cached_tokens))

    # steps

    def _run(self, step: do.RunStep) -> None:
        self._step_running = self._in_flight = True
        self._dropped = []
        seconds = self.engine.step_seconds(step.batch) * (0.5 + self.world.rng.random())
        self.world.kernel.after(seconds, lambda: self.process.run(lambda: self._computed(step, seconds)))

    def _computed(self, step: do.RunStep, seconds: float) -> None:
        """The step is done: its KV is written, its layers are on their way, and the outcome is known."""
        self._step_running = False
        fault, self.next_step_fault = self.next_step_fault, None
        last_layer = self.engine.layout.num_layers - 1

        def on_layer(layer: int) -> None:
            if fault is FaultKind.ENGINE_FAILED and layer == last_layer:
                raise ServingError("the engine raised", code="engine_failed")
            for push in step.pushes:
                if push.request_id not in self._dropped:
                    self._link(push.claims).push(push.request_id, push.claims, push.plan, layer)

        try:
            samples = self.engine.step(step.batch, None if self.closing else on_layer, PlannedUnwanted(self._dropped))
            if fault is FaultKind.ENGINE_CORRUPT:
                row = self.world.rng.choice(step.batch.rows)
                raise EngineCorrupt((row.sequence.request_id,))
        except EngineCorrupt as error:
            self.world.hit(error.request_ids, self)
            self.post(on.StepFailed(error.code, error.message, error.request_ids))
        except ServingError as error:
            self.world.hit([row.sequence.request_id for row in step.batch.rows], self)
            self.post(on.StepFailed(error.code, error.message))
        else:
            self.post(on.StepFinished(tuple(samples), seconds))
        self.check_closed()

    def _drop(self, request_id: str) -> None:
        """In a moment the engine goes on without a row, unless it is too late for that."""
        dropped, rng = self._dropped, self.world.rng

        def leave_out() -> None:
            if self._step_running and dropped is self._dropped:
                dropped.append(request_id)
                self.world.outcome.rows_dropped += 1
                self.post(on.RowsDropped((request_id,)))

        if rng.random() > TOO_LATE_SHARE:
            seconds = self.world.scenario.post_seconds * rng.random()
            self.world.kernel.after(seconds, lambda: self.process.run(leave_out))

    # data connections

    def _open_link(self, target: Life) -> None:
        """Have a link to this life of a worker: the one there is, or a new one."""
        link = self.links.get(target.worker_id)
        if link is not None and link.target is target and not link.lost:
            return
        if link is not None:
            link.end()
            self.old_links.append(link)
        self.links[target.worker_id] = PushLink(self, target)

    def _link(self, claims: TicketClaims) -> PushLink:
        return self.links[claims.worker_id]

    def begin_reading(self, request_id: str, transfers: Sequence[LayerTransfer]) -> int:
        """Somebody is going to read these pages; returns what to give to `end_reading`."""
        reading = next(self._readings)
        ranks_of_each = self.engine.layout.world_size // len(self.ranks)
        blocks = frames.blocks_read(transfers, self.memories)
        self.reading[reading] = (request_id, {(rank // ranks_of_each, block) for rank, block in blocks})
        return reading

    def end_reading(self, reading: int) -> None:
        self.reading.pop(reading, None)

    def read_pages(self, transfers: Sequence[LayerTransfer]) -> tuple[tuple[bytes, ...], int]:
        """The bytes that leave, and the digest of what should leave."""
        content = frames.read(transfers, self.memories)
        digest = frames.digest(content)
        if self.spoils:
            how = self.spoils.pop()
            self.tell("spoils a page on its way ({})", how)
            content = frames.spoiled(content, how, self.world.rng)
        return content, digest

    # ends

    def die(self) -> None:
        """SIGKILL."""
        self.killed = True
        self.process.die()
        for pipe in self.pipes_out:
            pipe.break_off()
        for pipe in self.pipes_in:
            pipe.drop()

    def close(self) -> None:
        """Stop serving: finish the running step, end all data connections, then go on in a new life."""
        self.closing = True
        if self.to_router is not None:
            self.to_router.end()
        for link in self.links.values():
            link.end()
        self.receiver.close()
        self.check_closed()

    def check_closed(self) -> None:
        """If nothing is left to wait for, this life is over."""
        links = [*self.links.values(), *self.old_links]
        if not self.closing or not self.process.alive or self._step_running or self.receiver.peers:
            return
        if all(link.at_rest for link in links):
            self.process.die()
            self.world.life_over(self)
