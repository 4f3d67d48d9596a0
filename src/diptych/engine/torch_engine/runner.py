"""TorchEngine: `core.ports.Engine` on torch, in this process."""

from __future__ import annotations

from pathlib import Path

import torch

from diptych.core.errors import ServingError
from diptych.core.fleet import ModelInfo
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.ports import AllocateKV, OnLayer, OnLost, Unwanted
from diptych.core.request import SampledToken
from diptych.core.sequence import Batch
from diptych.core.settings import ParallelSettings
from diptych.engine.torch_engine.checkpoint import open_checkpoint
from diptych.engine.torch_engine.shard import Shard
from diptych.engine.torch_engine.stage import DENSE_LIMIT, Stage, open_weights
from diptych.engine.torch_engine.weights import OnProgress


class TorchEngine:
    """Runs steps of one model in this process. Not thread-safe. Get one from `load`.

    On a CUDA device the KV cache lies in device memory, which no transport reaches yet: such an engine
    serves requests that are prefilled where they decode, and refuses `on_layer`.
    """

    def __init__(
        self, stage: Stage, model: ModelInfo, layout: KVLayout, device: torch.device, dense_limit: int
    ) -> None:
        self.model = model
        self.layout = layout
        self._stage = stage
        self._device = device
        self._dense_limit = dense_limit

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        block_size: int = 16,
        max_model_len: int | None = None,
        dense_limit: int = DENSE_LIMIT,
        on_progress: OnProgress | None = None,
    ) -> TorchEngine:
        """Load a checkpoint from a directory or, failing that, by its hub id.

        `dtype` is "float32", "bfloat16" or "auto" (the checkpoint's own; bfloat16 for a float16 one).
        `dense_limit` bounds, in bytes, a second copy of the contexts that are decoding (`dense_view`), which
        is memory on top of the KV cache; 0 does without it. CPU only. Measured with a model of 32 million
        parameters, one thread, 16 contexts of 1,024 tokens: a step takes 24 ms with it, 40 ms without.
        `on_progress(done, total)` is called after each layer. Raises CheckpointError or ConfigError.
        """
        checkpoint = open_checkpoint(path, dtype, max_model_len)
        layout = checkpoint.layout(block_size, ParallelSettings())
        torch_device = torch.device(device)
        files = open_weights(checkpoint, torch_device)
        stage = Stage(files, Shard(checkpoint.config, layout), torch_device, on_progress=on_progress)
        return cls(stage, checkpoint.model_info(files.digest()), layout, torch_device, dense_limit)

    def allocate_kv(self, num_blocks: int, allocate: AllocateKV) -> tuple[KVMemory, ...]:
        """See `core.ports.Engine`. On the CPU the cache lies in the allocated bytes themselves."""
        nbytes = self.layout.num_layers * num_blocks * self.layout.block_bytes
        memory = KVMemory(self.layout, num_blocks, allocate(nbytes).buffer)
        self._stage.take_kv(num_blocks, memory.buffer, self._dense_limit)
        return (memory,)

    def step(
        self, batch: Batch, on_layer: OnLayer | None = None, unwanted: Unwanted | None = None
    ) -> list[SampledToken | None]:
        """See `core.ports.Engine`. Raises EngineCorrupt for rows with non-finite logits; since a step
        changes nothing but KV of its own tokens, it may then be run again without them."""
        if on_layer is not None and self._device.type != "cpu":
            raise ServingError(f"KV in {self._device.type} memory cannot be handed off yet")
        return self._stage.step(batch, on_layer, unwanted)

    def forget(self, request_id: str) -> None:
        """See `core.ports.Engine`."""
        self._stage.forget(request_id)

    def watch(self, lost: OnLost) -> None:
        """It is lost when this process is."""

    def close(self) -> None:
        """Let go of the KV bytes, so that their owner can free them."""
        self._stage.close()
