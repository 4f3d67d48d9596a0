"""A fleet without machines: router and workers are the real policy objects over scripted engines, and
every message waits in a queue until a seeded choice delivers it.

Each (sender, receiver) pair is a queue of its own, in order; between queues any order may happen. Pages
are copied when their message is delivered, so a block that was given back too early shows in the tokens.
Workers may be cut into ranks, each in its own way.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping

from diptych.core import actions as do
from diptych.core import events as on
from diptych.core.errors import DiptychError
from diptych.core.fleet import Role, WorkerState, WorkerView
from diptych.core.kv_layout import PrivateMemory
from diptych.core.request import Request
from diptych.core.ticket import TicketClaims
from diptych.engine.scripted import ScriptedEngine, ScriptedModel, expected_tokens
from diptych.policy.batching import BatchLimits
from diptych.policy.block_pool import BlockPool
from diptych.policy.data_parallel import DataParallelPolicy
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.routing import Routing
from diptych.policy.worker import WorkerPolicy
from diptych.sim.unwanted import PlannedUnwanted

MODEL = ScriptedModel(block_size=4, max_model_len=256)


class WorldWorker:
    """One worker: policy, engine, and tickets that it has granted and not yet revoked or seen closed."""

    def __init__(self, world: World, worker_id: str, role: Role, num_blocks: int, model: ScriptedModel) -> None:
        self.world, self.worker_id, self.role = world, worker_id, role
        self.num_blocks, self.model, self.layout = num_blocks, model, model.layout
        self.engine = ScriptedEngine(model)
        self.kv = self.engine.allocate_kv(num_blocks, PrivateMemory)
        self.ranks = [self.make_rank(data_rank) for data_rank in range(self.layout.data_parallel)]
        self.policy = self.ranks[0] if len(self.ranks) == 1 else DataParallelPolicy(self.ranks)
        self.tickets: dict[str, TicketClaims] = {}
        self.unwanted: set[str] = set()  # rows of the running step
        self.pushing: dict[str, str] = {}  # request -> target
        self.writers: dict[str, str] = {}  # request -> source

    def make_rank(self, data_rank: int) -> WorkerPolicy:
        pool = BlockPool(self.num_blocks, self.layout.block_size)
        limits = BatchLimits(max_batch_tokens=16, max_sequences=6)
        return WorkerPolicy(self.layout, pool, limits, self.model.info.eos_token_ids, data_rank=data_rank)

    def view(self, state: WorkerState = WorkerState.READY) -> WorkerView:
        return WorkerView(
            worker_id=self.worker_id,
            role=self.role,
            state=state,
            epoch=1,
            num_blocks=self.num_blocks * len(self.ranks),
            block_size=self.layout.block_size,
            token_bytes=self.layout.token_bytes,
            transports=("shm",),
            stats=self.policy.stats(),
        )

    def handle(self, event: on.WorkerEvent) -> None:
        for action in self.policy.handle(event, self.world.now):
            self.perform(action)
        self.policy.check_integrity()

    def perform(self, action: do.WorkerAction) -> None:
        me, world = self.worker_id, self.world
        match action:
            case do.RunStep():
                self.unwanted = set()
                world.send(me, "engine " + me, lambda: self.step(action))
            case do.DropRow(request_id):
                self.unwanted.add(request_id)
            case do.SendFirstToken(output, cached, queue_seconds, prefill_seconds):
                world.cached[output.request_id] = cached
                event = on.FirstTokenMade(me, output, cached, queue_seconds, prefill_seconds)
                world.send(me, "router", lambda: world.route(event))
            case do.SendTokens(outputs):
                world.send(me, "router", lambda: world.route(on.TokensMade(me, outputs)))
            case do.SendFailure(request_id, code, message):
                world.send(me, "router", lambda: world.route(on.RequestFailed(me, request_id, code, message)))
            case do.GrantTicket():
                self.grant(action)
            case do.RevokeTicket(request_id):
                self.tickets.pop(request_id, None)
                world.send("writers of " + me, me, lambda: self.handle(on.WriterGone(request_id)))
            case do.PushPages():
                for layer in range(self.layout.num_layers):
                    self.push(action, layer)
            case do.CloseHandoff(request_id, claims, token):
                target = world.workers[claims.worker_id]
                world.send(me, target.worker_id, lambda: target.closed(claims, token, self), tag=request_id)
            case do.AbandonPush(request_id, claims):
                world.drop(me, claims.worker_id, tag=request_id)
                world.send("sender of " + me, me, lambda: self.handle(on.PushStopped(request_id)))
            case do.ForgetRequest():
                pass

    def step(self, run: do.RunStep) -> None:
        dropped: set[str] = set()

        def on_layer(layer: int) -> None:
            for push in run.pushes:
                if push.request_id not in dropped:
                    self.push(push, layer)

        def let_go(request_ids: tuple[str, ...]) -> None:
            dropped.update(request_ids)
            self.world.num_dropped += len(request_ids)
            self.handle(on.RowsDropped(request_ids))

        questions = self.world.random.randrange(self.layout.num_layers + 1) if self.unwanted else 0
        samples = self.engine.step(run.batch, on_layer, PlannedUnwanted(self.unwanted, questions, let_go))
        self.handle(on.StepFinished(tuple(samples), seconds=0.01))

    def grant(self, grant: do.GrantTicket) -> None:
        claims = TicketClaims(
            request_id=grant.request.request_id,
            worker_id=self.worker_id,
            epoch=1,
            blocks=grant.blocks,
            first_block=grant.first_block,
            num_tokens=grant.num_tokens,
            layout=self.layout,
            data_rank=grant.data_rank,
            model_digest=self.model.info.digest,
            salt="",
            nonce=b"n" * 16,
        )
        self.tickets[claims.request_id] = claims
        self.world.claims[claims.request_id] = claims
        event = on.TicketGranted(self.worker_id, claims.request_id, claims.request_id.encode(), grant.num_cached_tokens)
        self.world.send(self.worker_id, "router", lambda: self.world.route(event))

    def push(self, push: do.PushPages, layer: int) -> None:
        target = self.world.workers[push.claims.worker_id]
        self.pushing[push.request_id] = target.worker_id
        deliver = lambda: target.take_in(push, layer, self)  # noqa: E731
        self.world.send(self.worker_id, target.worker_id, deliver, tag=push.request_id)

    def take_in(self, push: do.PushPages, layer: int, source: WorldWorker) -> None:
        """A layer's pages arrive: copied now, out of what the source's memory holds now."""
        if self.tickets.get(push.request_id) != push.claims:
            return
        self.writers[push.request_id] = source.worker_id
        for piece in push.plan.layers:
            if piece.layer == layer:
                theirs, ours = source.kv[piece.source_rank].layer(layer), self.kv[piece.target_rank].layer(layer)
                for span in piece.ranges:
                    page = theirs[span.source_offset : span.source_offset + span.length]
                    ours[span.target_offset : span.target_offset + span.length] = page

    def closed(self, claims: TicketClaims, token: object, source: WorldWorker) -> None:
        """All pages are here."""
        request_id = claims.request_id
        known = self.tickets.pop(request_id, None) == claims
        verdict = on.PushAccepted(request_id) if known else on.PushRejected(request_id, "ticket_refused", "revoked")
        self.world.send(self.worker_id, source.worker_id, lambda: source.handle(verdict))
        if known:
            self.handle(on.HandoffComplete(request_id, token))


class World:
    """Everything, and the seeded choice of what happens next."""

    def __init__(
        self,
        seed: int,
        roles: dict[str, Role],
        *,
        num_blocks: int = 64,
        models: Mapping[str, ScriptedModel] | None = None,
    ) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.queues: dict[tuple[str, str], deque[tuple[str, Callable[[], None]]]] = {}
        self.router = RouterPolicy(Routing())
        self.claims: dict[str, TicketClaims] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.errors: dict[str, DiptychError] = {}
        self.routes: dict[str, str] = {}
        self.cached: dict[str, int] = {}  # by attempt: what its prefill worker had cached
        self.num_dropped = 0  # rows, out of running steps
        self.dead: set[str] = set()
        self.leaving: set[str] = set()
        cuts = models or {}
        self.workers = {
            name: WorldWorker(self, name, role, num_blocks, cuts.get(name, MODEL)) for name, role in roles.items()
        }
        for worker in self.workers.values():
            self.route(on.WorkerUpdated(worker.view()))

    def send(self, sender: str, receiver: str, deliver: Callable[[], None], tag: str = "") -> None:
        self.queues.setdefault((sender, receiver), deque()).append((tag, deliver))

    def drop(self, sender: str, receiver: str, tag: str) -> None:
        queue = self.queues.get((sender, receiver), deque())
        kept = [entry for entry in queue if entry[0] != tag]
        queue.clear()
        queue.extend(kept)

    def under_way(self) -> list[tuple[str, str]]:
        """Who sends messages to whom."""
        return [key for key, queue in self.queues.items() if queue]

    def step(self) -> bool:
        """Deliver one message or, if none is under way, let time pass. False if nothing is left to happen."""
        busy = self.under_way()
        if not busy:
            return self.pass_time()
        self.now += 0.001
        _, deliver = self.queues[self.random.choice(busy)].popleft()
        deliver()
        return True

    def pass_time(self) -> bool:
        """To when the router has planned something, or by a second if somebody waits; False if there is neither."""
        wake_at = self.router.wake_at(self.now)
        if wake_at is None and not self.router.live:
            return False
        self.now = self.now + 1.0 if wake_at is None else wake_at
        self.route(on.Tick())
        return True

    def run(self, limit: int = 100_000) -> None:
        """Go on until nothing is left to happen."""
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError(f"still busy after {limit} messages")

    def submit(self, request: Request) -> None:
        self.tokens[request.request_id] = []
        self.route(on.RequestSubmitted(request))
        live = self.router.live.get(request.request_id)
        if live is not None and live.route is not None:
            self.routes[request.request_id] = live.route.header()

    def kill(self, name: str, *, back: bool = True) -> None:
        """A worker dies with everything that is on its way to or from it; a new life takes its place, now or when it
        is revived."""
        for key, queue in self.queues.items():
            if any(name in end.split() for end in key):
                queue.clear()
        dead = self.workers[name]
        self.workers[name] = WorldWorker(self, name, dead.role, dead.num_blocks, dead.model)
        for worker in self.workers.values():
            pushing = tuple(request_id for request_id, target in worker.pushing.items() if target == name)
            if pushing:
                event = on.LinkLost(name, pushing)
                self.send("links of " + worker.worker_id, worker.worker_id, lambda w=worker, e=event: w.handle(e))
            for request_id in [r for r, source in worker.writers.items() if source == name and r in worker.tickets]:
                failure = on.HandoffFailed(request_id, "transfer_failed", "the source is gone")
                self.send("links of " + worker.worker_id, worker.worker_id, lambda w=worker, e=failure: w.handle(e))
        self.dead.add(name)
        self.leaving.discard(name)
        self.route(on.WorkerGone(name))
        if back:
            self.revive(name)

    def revive(self, name: str) -> None:
        """The next life of a dead worker registers."""
        self.dead.remove(name)
        self.route(on.WorkerUpdated(self.workers[name].view()))

    def leave(self, name: str) -> None:
        """A worker wants to go; it does once nobody needs it."""
        self.leaving.add(name)
        self.route(on.WorkerUpdated(self.workers[name].view(WorkerState.DRAINING)))

    def cancel(self, request_id: str) -> None:
        self.route(on.RequestCancelled(request_id))

    def route(self, event: on.RouterEvent) -> None:
        for action in self.router.handle(event, self.now):
            self.perform(action)
        for name in sorted(self.leaving):
            if name in self.leaving and not self.router.is_needed(name):
                self.kill(name, back=False)

    def perform(self, action: do.RouterAction) -> None:
        match action:
            case do.Deliver(output):
                tokens = self.tokens[output.request_id]
                assert output.index == len(tokens)
                assert output.request_id not in self.finished
                tokens.append(output.token.token_id)
                if output.finish is not None:
                    self.finished.add(output.request_id)
            case do.DeliverFailure(request_id, error):
                assert request_id not in self.errors
                self.errors[request_id] = error
            case do.StartLocal(worker_id, request, outputs):
                self.to_worker(worker_id, on.ServeRequested(request, outputs))
            case do.ReserveBlocks(worker_id, request, outputs):
                self.to_worker(worker_id, on.ReserveRequested(request, outputs))
            case do.StartPrefill(worker_id, request, ticket, _, _, outputs):
                self.to_worker(worker_id, on.PrefillRequested(request, self.claims[ticket.decode()], outputs))
            case do.AbortOn(worker_id, request_id):
                self.to_worker(worker_id, on.AbortRequested(request_id))

    def to_worker(self, worker_id: str, event: on.WorkerEvent) -> None:
        self.send("router", worker_id, lambda: self.workers[worker_id].handle(event))

    def check_answered(self, request: Request) -> None:
        """Run to the end: a request of the usual model has all of its tokens, the right ones, and nothing is left."""
        self.run()
        assert not self.errors
        right = expected_tokens(request.prompt_token_ids, request.sampling.max_tokens, request.sampling, MODEL)
        assert self.tokens[request.request_id] == right
        self.check_clean()

    def check_clean(self) -> None:
        """Nothing is left anywhere."""
        assert not self.router.live
        for worker in self.workers.values():
            worker.policy.check_integrity()
            assert worker.policy.idle, worker.worker_id
            assert worker.policy.stats().blocks_used == 0, worker.worker_id
            assert not worker.tickets
