"""What a worker process is told when it starts (as JSON on its standard input, since it holds a key)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from diptych.core.errors import ConfigError
from diptych.core.fleet import Epoch, Role, WorkerId

MAX_STREAMS = 16  # connections of one link that a target serves


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSettings:
    """How a worker's model is cut into ranks (see core.kv_layout). `expert` is 1 (experts lie wherever their
    layer does) or data * tensor (they are spread over these ranks).

    Raises ConfigError for a cut that makes no sense."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        if min(self.tensor, self.pipeline, self.data, self.expert) < 1:
            raise ConfigError("every kind of parallelism is at least 1")
        if self.expert not in (1, self.data * self.tensor):
            raise ConfigError(
                f"expert parallelism is 1 or data x tensor parallelism ({self.data * self.tensor}), not {self.expert}"
            )

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Which engine serves which model. `max_model_len` None means what the checkpoint allows."""

    kind: str = "torch"  # "torch" | "scripted"
    model: str = ""  # checkpoint directory, or hub id
    served_name: str = ""
    device: str = "cpu"
    dtype: str = "auto"
    block_size: int = 16
    max_model_len: int | None = None
    parallel: ParallelSettings = field(default_factory=ParallelSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutSettings:
    """What the workers of one role may do differently from others: their ranks, and their blocks' size (None: no)."""

    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    block_size: int | None = None

    def of(self, engine: EngineSettings) -> EngineSettings:
        """This engine, cut."""
        return replace(engine, parallel=self.parallel, block_size=self.block_size or engine.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """`kv_tokens` is for a worker with all its data-parallel ranks; None means a share of the machine's free memory."""

    kv_tokens: int | None = None
    eviction: str = "lru"
    prefix_caching: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """Bounds of one step, on each data-parallel rank (see policy.batching.BatchLimits).

    Raises ConfigError unless sequences that decode leave room for a prompt in every step."""

    max_batch_tokens: int = 512
    max_sequences: int = 64

    def __post_init__(self) -> None:
        if self.max_sequences >= self.max_batch_tokens:
            raise ConfigError(
                f"--max-sequences {self.max_sequences} must be less than --max-batch-tokens {self.max_batch_tokens}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuSettings:
    """Cores this worker is pinned to with all its ranks (empty: not pinned), and each rank's threads inside an
    operation."""

    cores: tuple[int, ...] = ()
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """`router` is the address to join, `key` the fleet's secret, `run_dir` where sockets live.

    `data_host` is this machine's address for pages that come over TCP, encrypted with `tls`; None means the
    address from which it reaches the router. `num_streams` is how many connections, each with a thread, push pages to
    one other worker (at most MAX_STREAMS; ConfigError otherwise). `grace` is how long (s) it may take to leave once
    it is told to.
    """

    worker_id: WorkerId
    role: Role
    epoch: Epoch
    router: str
    key: bytes
    run_dir: str
    transports: tuple[str, ...] = ("shm", "tcp")
    data_host: str | None = "127.0.0.1"
    tls: bool = False
    num_streams: int = 2
    engine: EngineSettings = field(default_factory=EngineSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    cpu: CpuSettings = field(default_factory=CpuSettings)
    grace: float = 30.0
    journal: str | None = None  # file for a JSONL record of events and actions

    def __post_init__(self) -> None:
        if not 1 <= self.num_streams <= MAX_STREAMS:
            raise ConfigError(f"{self.num_streams} connections to each worker, not between 1 and {MAX_STREAMS}")
