"""Workers as the router sees them: frozen snapshots, never live objects."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from diptych.core.kv_layout import KVLayout

WorkerId = str
Epoch = int

_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_worker_id(text: str) -> bool:
    """Whether a text can name a worker. Names go into headers, logs and file names, so they are plain."""
    return _WORKER_ID.fullmatch(text) is not None


class Role(StrEnum):
    """A preference held by the router. Every worker can do both phases."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


def can_serve(roles: Collection[Role]) -> bool:
    """Whether workers of these roles are what a server is meant to have: a pair, or one that does both."""
    return Role.MIXED in roles or (Role.PREFILL in roles and Role.DECODE in roles)


class WorkerState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


class BreakerState(StrEnum):
    """Whether a worker, or a pair, gets clients' requests (closed: it does)."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Readiness(StrEnum):
    """Whether a server can serve as it is meant to."""

    NO = "not ready"
    DEGRADED = "degraded"
    YES = "ok"

    @property
    def reason(self) -> str:
        """Why it is not better; empty if all is well."""
        match self:
            case Readiness.NO:
                return "not enough workers are ready"
            case Readiness.DEGRADED:
                return "no prefill worker can hand KV over to a decode worker: requests are served un-split"
            case Readiness.YES:
                return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a worker serves. Workers of one fleet must agree on all of it (checked at hello)."""

    name: str
    digest: str  # of config, weights' names/shapes/sizes and tokenizer; "same model" in one string
    vocab_size: int
    max_model_len: int  # tokens, prompt and output together
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEndpoint:
    """Where a decode worker takes pages in: `address` is where its data channel listens.

    With transport "shm" that is `unix:PATH`, and the worker passes a descriptor of its KV memory over it;
    with "tcp" it is `tcp:HOST:PORT` or `tls:HOST:PORT`, and pages follow in the frames. With "nixl" it is
    `tcp:HOST:PORT`, and NIXL writes the pages; with "fastest" it does so if the source finds that faster.
    """

    transport: str  # "shm" | "tcp" | "nixl" | "fastest"
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a worker says of itself when it registers. `num_blocks` are those of all its data-parallel ranks
    together. Workers of equal `host` can share memory."""

    model: ModelInfo
    layout: KVLayout
    num_blocks: int
    endpoints: tuple[KVEndpoint, ...] = ()
    host: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """A worker's load, as sent with each heartbeat and after each step that changed it."""

    running: int = 0  # sequences that take part in steps
    waiting: int = 0  # sequences that wait for blocks or for their turn
    blocks_used: int = 0  # referenced by live requests (or by a writer not yet gone)
    blocks_cached: int = 0  # kept for reuse, free to evict
    prefill_tokens_queued: int = 0  # known tokens without KV, over all sequences
    prefill_rate: float = 0.0  # tokens/s, measured over recent prefill steps; 0 while unknown
    decode_step_seconds: float = 0.0  # recent mean of pure decode steps; 0 while unknown
    preemptions: int = 0  # since start
    handoffs_failed: int = 0  # since start
    rows_dropped: int = 0  # since start: out of running steps, since nobody wanted them any more


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker at one moment, for routing and for `/fleet`. `turned_away` says what came over its data connections
    and was not taken: (why, how often), since its start."""

    worker_id: WorkerId
    role: Role
    state: WorkerState
    epoch: Epoch
    pid: int = 0
    cut: str = ""  # into ranks, in short ("tp4 ep4")
    num_blocks: int = 0  # of all data-parallel ranks together
    block_size: int = 16
    token_bytes: int = 0  # KV bytes per token, all layers
    transports: tuple[str, ...] = ()
    host: str = ""  # workers of equal host can share memory
    stats: WorkerStats = field(default_factory=WorkerStats)
    turned_away: tuple[tuple[str, int], ...] = ()

    @property
    def blocks_free(self) -> int:
        return self.num_blocks - self.stats.blocks_used


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    """The router's own load, now, and its counts since start.

    `worker_breakers` and `pair_breakers`, of (prefill, decode), are about those that have failed lately: whoever is
    not there is trusted."""

    running: int = 0  # requests that workers have
    waiting: int = 0  # requests in the queue
    waiting_tokens: int = 0  # of their prompts
    retried: int = 0  # attempts after the first
    moved: int = 0  # streams handed over by workers that leave
    checkpoints: int = 0  # copies of streams' KV that arrived
    checkpoint_tokens: int = 0  # of the logs, whose KV was sent for them
    ignored: int = 0  # messages about requests that are over, and tokens that came twice
    worker_breakers: Mapping[WorkerId, BreakerState] = field(default_factory=dict)
    pair_breakers: Mapping[tuple[WorkerId, WorkerId], BreakerState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request is served. `prefill` is None when it is prefilled where it decodes."""

    decode: WorkerId
    prefill: WorkerId | None = None
    transport: str = ""

    def header(self) -> str:
        """The value of `x-diptych-route`."""
        if self.prefill is None:
            return f"local={self.decode}"
        return f"prefill={self.prefill};decode={self.decode};transport={self.transport}"
