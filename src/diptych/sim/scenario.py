"""What a seed stands for: a fleet, what clients ask of it, and what goes wrong when.

Everything is drawn before anything runs, so a failing scenario can be made smaller by leaving things out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from enum import StrEnum

from diptych.core.blocks import blocks_for
from diptych.core.fleet import Role
from diptych.core.request import Preference, Request, SamplingParams
from diptych.core.settings import ParallelSettings
from diptych.engine.scripted import ScriptedModel, StepCost

BLOCK_SIZE = 4
MAX_MODEL_LEN = 48  # tokens
SHARED = tuple(range(1, 25))  # prompts begin with some of these, so that prefixes are shared


class FaultKind(StrEnum):
    KILL = "kill"  # SIGKILL; a new life comes `seconds` later
    FREEZE = "freeze"  # SIGSTOP, and SIGCONT after `seconds`
    LEAVE = "leave"  # SIGTERM: no new work, it ends when nobody needs it, and comes back
    PARTITION = "partition"  # nothing passes between `worker` and `other`, both ways, for `seconds`
    ONE_WAY = "one-way partition"  # nothing passes from `worker` to `other`
    DELAY = "delay"  # everything from `worker` to `other` takes `extra` longer
    DISORDER = "disorder"  # frames of data connections from `worker` to `other` double and overtake each other
    CORRUPT = "corrupt"  # the next pages that `worker` pushes are spoiled, as `how` says
    CLOCK_JUMP = "clock jump"  # the clock of `worker` leaps forward by `extra`
    ENGINE_CORRUPT = "engine corrupt"  # the next step of `worker` yields no finite numbers for one request
    ENGINE_FAILED = "engine failed"  # the next step of `worker` raises
    ROUTER_RESTART = "router restart"  # it dies with all streams, and another one is there at once, with no memory


class Spoil(StrEnum):
    """What becomes of pages on their way (as `transfer.faulty`)."""

    FLIP = "flip"
    DROP = "drop"
    ZERO = "zero"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A supervised worker that falls silent is killed, and starts in fresh memory; another one finds out by itself
    that the router has given it up, and leads its next life in the same memory."""

    worker_id: str
    role: Role
    host: str
    num_blocks: int
    supervised: bool
    block_size: int = BLOCK_SIZE
    parallel: ParallelSettings = field(default_factory=ParallelSettings)

    def cut(self, model: ScriptedModel) -> ScriptedModel:
        """The model as this worker holds it. It has `num_blocks` blocks on each data-parallel rank."""
        return replace(model, block_size=self.block_size, parallel=self.parallel)


@dataclass(frozen=True, slots=True)
class RequestSpec:
    at: float  # seconds
    request: Request
    cancel_after: float | None = None  # seconds after `at`


@dataclass(frozen=True, slots=True)
class Fault:
    """Strikes at `at` seconds or, if `after_event` is given, at the n-th event of the fleet's policies.

    `worker` names its victim; if it is "", that is one that is busy then."""

    kind: FaultKind
    worker: str
    at: float = 0.0
    after_event: int | None = None
    seconds: float = 0.0
    other: str = ""  # a worker, or the router
    extra: float = 0.0
    how: Spoil = Spoil.FLIP


@dataclass(frozen=True, slots=True)
class Scenario:
    seed: int
    workers: tuple[WorkerSpec, ...]
    requests: tuple[RequestSpec, ...]
    faults: tuple[Fault, ...]
    model: ScriptedModel
    cost: StepCost
    latency: float  # seconds, of a message
    report_seconds: float  # how long a change of load may wait before it is reported
    post_seconds: float  # from a thread of a worker to its loop
    handoff_timeout: float
    max_batch_tokens: int
    max_sequences: int


def draw(seed: int) -> Scenario:
    """The scenario that a seed stands for."""
    rng = random.Random(seed)
    crowded = rng.random() < 0.15
    workers = _workers(rng, crowded)
    step = rng.choice((0.004, 0.02, 0.1, 0.4))
    busy = 0.0 if crowded else rng.choice((0.0, 2.0, 20.0)) * step  # between arrivals
    requests = _requests(rng, busy, 10 if crowded else rng.choice((1, 3, 6, 10)))
    span = requests[-1].at + 12 * step
    names = [worker.worker_id for worker in workers]
    any_cut = any(worker.parallel.world_size > 1 for worker in workers)
    faults = tuple(_fault(rng, names, span) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 6))))
    scenario = Scenario(
        seed=seed,
        workers=workers,
        requests=requests,
        faults=faults,
        model=ScriptedModel(
            max_model_len=MAX_MODEL_LEN,
            num_layers=2 if any_cut else rng.choice((1, 2)),
            num_kv_heads=2 if any_cut else 1,
            eos_every=20,
        ),
        cost=StepCost(step=step, token=step / 20),
        latency=rng.choice((0.0005, 0.005, 0.1)),
        post_seconds=rng.choice((1e-4, 1e-4, 0.02)),
        handoff_timeout=max(10.0, 100 * step),
        report_seconds=rng.choice((0.02, 0.3, 1.0)),
        max_batch_tokens=rng.choice((8, 16, 64)),
        max_sequences=rng.choice((2, 4, 6)),
    )
    return _insured(scenario, rng) if rng.random() < 0.3 else scenario


def _insured(scenario: Scenario, rng: random.Random) -> Scenario:
    """The same, with some of its streams copied to other workers while they run, or their prefill raced."""
    requests = (
        replace(
            spec,
            request=replace(spec.request, checkpoint_tokens=rng.choice((0, 1, 4, 8)), race=rng.choice((1, 1, 2, 3))),
        )
        for spec in scenario.requests
    )
    return replace(scenario, requests=tuple(requests))


def _workers(rng: random.Random, crowded: bool) -> tuple[WorkerSpec, ...]:
    """A fleet; with `crowded`, one with far too few blocks for what is to come."""
    roles = [Role.PREFILL] * rng.choice((1, 1, 2, 3)) + [Role.DECODE] * rng.choice((1, 1, 2, 3))
    roles += [Role.MIXED] * rng.choice((0, 0, 1, 2))
    if rng.random() < 0.1:
        roles = [Role.MIXED] * rng.choice((1, 2, 3))
    if crowded:
        roles = rng.choice(([Role.MIXED], [Role.MIXED, Role.MIXED], [Role.PREFILL, Role.DECODE]))
    hosts = rng.choice((("a",), ("a", "b")))
    # The shells refuse less than one request of full length.
    kv_tokens = MAX_MODEL_LEN + 4 if crowded else rng.choice((MAX_MODEL_LEN + 4, MAX_MODEL_LEN + 16, 96, 192))
    uniform = rng.random() < 0.7
    workers = []
    for number, role in enumerate(roles):
        block_size, parallel = (BLOCK_SIZE, ParallelSettings()) if uniform else _cut(rng)
        num_blocks, supervised = blocks_for(kv_tokens, block_size), rng.random() < 0.5
        worker = WorkerSpec(
            f"{role}-{number}",
            role,
            rng.choice(hosts),
            num_blocks,
            supervised,
            block_size=block_size,
            parallel=parallel,
        )
        workers.append(worker)
    return tuple(workers)


def _cut(rng: random.Random) -> tuple[int, ParallelSettings]:
    """How one worker is cut into ranks, and its blocks' size."""
    parallel = ParallelSettings(
        tensor=rng.choice((1, 1, 2, 4)), pipeline=rng.choice((1, 1, 2)), data=rng.choice((1, 1, 1, 2))
    )
    return rng.choice((2, 4, 8)), parallel


def _requests(rng: random.Random, busy: float, count: int) -> tuple[RequestSpec, ...]:
    at = 0.2
    requests: list[RequestSpec] = []
    for number in range(1, count + 1):
        shared = SHARED[: rng.choice((0, 0, 8, 20))]
        prompt = (*shared, *(rng.randrange(30, 256) for _ in range(rng.randrange(1, 20))))
        sampling = SamplingParams(
            temperature=rng.choice((0.0, 1.0)),
            seed=rng.randrange(1 << 32),
            max_tokens=min(rng.choice((1, 2, 5, 10, 24)), MAX_MODEL_LEN - len(prompt)),
        )
        prefer = rng.choice((Preference.AUTO, Preference.SPLIT, Preference.SPLIT, Preference.LOCAL))
        tenant = rng.choice(("", "", "tenant"))
        request = Request(
            request_id=f"r{number}",
            prompt_token_ids=prompt,
            sampling=sampling,
            prefer=prefer,
            cache_salt=tenant,
            tenant=tenant,
        )
        cancel_after = rng.expovariate(1.0) * (busy + 0.1) if rng.random() < 0.15 else None
        requests.append(RequestSpec(at, request, cancel_after))
        at += rng.expovariate(1.0) * busy
    return tuple(requests)


def _fault(rng: random.Random, names: list[str], span: float) -> Fault:
    kind = rng.choice(_KINDS)
    worker = rng.choice(("", rng.choice(names)))
    others = [name for name in names if name != worker]
    if kind is not FaultKind.DISORDER or not others:
        others.append("router")
    return Fault(
        kind=kind,
        worker=worker,
        at=rng.uniform(0.15, span),
        after_event=rng.randrange(12, 120) if rng.random() < 0.5 else None,
        seconds=rng.choice((0.3, 3.0, 12.0, 24.0)) * (0.5 + rng.random()),
        other=rng.choice(others),
        extra=rng.choice((0.2, 1.0, 4.0) if kind is FaultKind.DELAY else (1.0, 20.0, 300.0)),
        how=rng.choice(list(Spoil)),
    )


_KINDS = (
    *([FaultKind.KILL] * 4),
    *([FaultKind.FREEZE] * 3),
    *([FaultKind.PARTITION] * 2),
    *([FaultKind.CORRUPT] * 2),
    FaultKind.LEAVE,
    FaultKind.ONE_WAY,
    FaultKind.ONE_WAY,
    FaultKind.DELAY,
    FaultKind.DISORDER,
    FaultKind.CLOCK_JUMP,
    FaultKind.ENGINE_CORRUPT,
    FaultKind.ENGINE_FAILED,
    FaultKind.ROUTER_RESTART,
)
