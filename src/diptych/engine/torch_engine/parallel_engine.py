"""ParallelEngine: `core.ports.Engine` over rank processes that share the work. Loads no torch.

This process leads: it holds no weights and computes nothing, but maps every rank's KV memory (on one host), so that
hand-offs are its business alone. Ranks run the same step at the same time, each its own `stage.Stage`.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from diptych.core.errors import ConfigError, EngineCorrupt, EngineLost, ProtocolError, ServingError
from diptych.core.fleet import ModelInfo
from diptych.core.kv_layout import KVMemory
from diptych.core.ports import AllocateKV, OnLayer, OnLost, Unwanted
from diptych.core.request import SampledToken
from diptych.core.sequence import Batch
from diptych.core.settings import EngineSettings
from diptych.engine.torch_engine import rank_messages as messages
from diptych.engine.torch_engine.checkpoint import open_checkpoint
from diptych.engine.torch_engine.mirror import Teller
from diptych.engine.torch_engine.rank_processes import SILENCE_SECONDS, ProcessEnds, RankProcesses
from diptych.engine.torch_engine.shard import Shard

OnProgress = Callable[[int, int], None]


class ParallelEngine:
    """Runs steps of one model on several ranks. Not thread-safe. Get one from `load`.

    Anything that goes wrong on a rank, other than logits that are not finite, is an EngineLost: this engine has
    ended its ranks then, and raises it ever after. So is a step during which all ranks are silent for
    `silence_seconds`."""

    silence_seconds = SILENCE_SECONDS

    def __init__(self, ranks: RankProcesses, shards: Sequence[Shard], model: ModelInfo, on_cpu: bool) -> None:
        self.model = model
        self.layout = shards[0].layout
        self._ranks = ranks
        self._shards = shards
        self._on_cpu = on_cpu
        self._tellers = [Teller() for _ in range(self.layout.data_parallel)]
        self._has_kv = False
        self._lock = threading.Lock()  # guards the ranks, and what follows
        self._lost: OnLost | None = None
        self._watcher = threading.Thread(target=self._watch, args=(ranks.ends(),), name="ranks", daemon=True)
        self._watcher.start()

    @classmethod
    def load(
        cls, settings: EngineSettings, cores: Sequence[int] = (), on_progress: OnProgress | None = None
    ) -> ParallelEngine:
        """Start the ranks that `settings.parallel` asks for, each on one of `cores`, and have them load their shares.

        `on_progress(done, total)` counts layers of ranks. Raises CheckpointError or ConfigError, without starting
        anything if the model cannot be cut so; EngineLost if a rank breaks down.
        """
        checkpoint = open_checkpoint(settings.model, settings.dtype, settings.max_model_len)
        layout = checkpoint.layout(settings.block_size, settings.parallel)
        shards = [Shard(checkpoint.config, layout, rank) for rank in range(layout.world_size)]
        ranks = RankProcesses(layout.world_size)
        try:
            digest = _start(ranks, replace(settings, model=str(checkpoint.directory)), cores, on_progress)
        except BaseException:
            ranks.close()
            raise
        return cls(ranks, shards, checkpoint.model_info(digest), settings.device == "cpu")

    @property
    def pids(self) -> list[int]:
        """Of the rank processes, in order."""
        return self._ranks.pids

    def allocate_kv(self, num_blocks: int, allocate: AllocateKV) -> tuple[KVMemory, ...]:
        """See `core.ports.Engine`. Raises ConfigError for memory that other processes cannot map."""
        memories = []
        with self._lock:
            for shard in self._shards:
                nbytes = len(shard.layers) * num_blocks * self.layout.block_bytes
                content = allocate(nbytes)
                if content.descriptor is None:
                    raise ConfigError("KV memory of several ranks has to be shared memory")
                self._ranks.send(shard.rank, messages.TakeKV(num_blocks, nbytes), content.descriptor)
                memories.append(KVMemory(self.layout, num_blocks, content.buffer, shard.rank))
            for _ in self._shards:
                self._ranks.receive(self.silence_seconds)  # KVTaken
        self._has_kv = True
        return tuple(memories)

    def step(
        self, batch: Batch, on_layer: OnLayer | None = None, unwanted: Unwanted | None = None
    ) -> list[SampledToken | None]:
        """See `core.ports.Engine`. Raises EngineCorrupt for rows with non-finite logits: the step may then be run
        again without them. Unwanted rows stay to the end: ranks wait for each other in every layer, and would all have
        to leave them out before the same one."""
        if not self._has_kv:
            raise ServingError("allocate_kv comes before the first step")
        if on_layer is not None and not self._on_cpu:
            raise ServingError("KV in device memory cannot be handed off yet")
        if not batch.rows:
            return []
        step = _Step(self._shards, batch, on_layer)
        with self._lock:
            try:
                self._send_step(batch, on_layer is not None)
                while step.num_running:
                    step.take(*self._ranks.receive(self.silence_seconds))
            except BaseException:
                self._ranks.close()  # nobody knows any more what ranks are at
                raise
        if step.corrupt:
            raise EngineCorrupt(tuple(step.corrupt))
        return step.results

    def _send_step(self, batch: Batch, reports_layers: bool) -> None:
        orders = [
            messages.Step([teller.tell(row) for row in batch.rows if row.sequence.data_rank == rank], reports_layers)
            for rank, teller in enumerate(self._tellers)
        ]
        for shard in self._shards:
            self._ranks.send(shard.rank, orders[shard.data_rank])

    def forget(self, request_id: str) -> None:
        """See `core.ports.Engine`."""
        knowing = {rank for rank, teller in enumerate(self._tellers) if teller.forget(request_id)}
        with self._lock, contextlib.suppress(EngineLost):  # whoever watches will hear it
            for shard in self._shards:
                if shard.data_rank in knowing:
                    self._ranks.send(shard.rank, messages.Forget(request_id))

    def watch(self, lost: OnLost) -> None:
        """See `core.ports.Engine`."""
        with self._lock:
            self._lost = lost
            failure = self._ranks.failure
        if isinstance(failure, EngineLost):
            lost(failure)

    def _watch(self, ends: ProcessEnds) -> None:
        """On a thread of its own: a rank that ends while nobody speaks to it. (A step notices by itself, and may know
        more about why.)"""
        rank = ends.first()
        with self._lock:
            if self._ranks.failure is not None:
                return
            failure, lost = self._ranks.ended(rank), self._lost
        if lost is not None and isinstance(failure, EngineLost):
            lost(failure)

    def close(self) -> None:
        """End all ranks."""
        with self._lock:
            self._ranks.close()
        self._watcher.join()


class _Step:
    """What has come back of a step so far. `num_running` ranks have not finished it."""

    def __init__(self, shards: Sequence[Shard], batch: Batch, on_layer: OnLayer | None) -> None:
        self.results: list[SampledToken | None] = [None] * len(batch.rows)
        self.corrupt: list[str] = []
        self.num_running = len(shards)
        self._shards = shards
        self._on_layer = on_layer
        self._rows: list[list[int]] = [[] for _ in range(shards[0].layout.data_parallel)]
        for row, scheduled in enumerate(batch.rows):
            self._rows[scheduled.sequence.data_rank].append(row)
        self._unwritten = [0] * shards[0].layout.num_layers  # ranks that still have to write each layer's KV
        for shard in shards:
            for layer in shard.layers if self._rows[shard.data_rank] else ():
                self._unwritten[layer] += 1
        self._next_layer = 0

    def take(self, rank: int, message: messages.FromRank) -> None:
        """Take in what a rank says. Raises ProtocolError for what is no part of a step."""
        match message:
            case messages.LayerDone(layer):
                self._unwritten[layer] -= 1
                self._report_layers()
            case messages.StepDone(samples):
                for row, sample in zip(self._rows[self._shards[rank].data_rank], samples, strict=False):
                    self.results[row] = sample
                self.num_running -= 1
            case messages.StepCorrupt(request_ids):
                self.corrupt += request_ids
                self.num_running -= 1
            case _:
                raise ProtocolError(f"rank {rank} sends {type(message).__name__} during a step")

    def _report_layers(self) -> None:
        """In order, even if a later stage has caught up on other data-parallel ranks."""
        while self._next_layer < len(self._unwritten) and not self._unwritten[self._next_layer]:
            if self._on_layer is not None:
                self._on_layer(self._next_layer)
            self._next_layer += 1


def _start(ranks: RankProcesses, settings: EngineSettings, cores: Sequence[int], on_progress: OnProgress | None) -> str:
    """Have all ranks load, and meet in a directory that only this user can read. Returns the model's digest."""
    with tempfile.TemporaryDirectory(prefix="diptych-") as directory:
        rendezvous = str(Path(directory) / "ranks")
        for rank in range(settings.parallel.world_size):
            pinned = [cores[rank % len(cores)]] if cores else []
            ranks.send(rank, messages.Start(rank, settings, pinned, rendezvous))
        digest = ""
        progress = [(0, 0)] * settings.parallel.world_size
        num_loading = len(progress)
        while num_loading:
            rank, message = ranks.receive()
            match message:
                case messages.Loading(done, total):
                    progress[rank] = (done, total)
                    if on_progress is not None and all(total for _, total in progress):
                        on_progress(sum(done for done, _ in progress), sum(total for _, total in progress))
                case messages.Ready(found):
                    digest = found or digest
                    num_loading -= 1
                case _:
                    raise ProtocolError(f"rank {rank} sends {type(message).__name__} while it loads")
    return digest
