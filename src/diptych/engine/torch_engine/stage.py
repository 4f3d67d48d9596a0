"""Steps of what one rank holds of a model: all of it, or some layers, heads and experts."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.core.errors import ServingError
from diptych.core.ports import OnLayer, Unwanted
from diptych.core.request import SampledToken
from diptych.core.sequence import Batch
from diptych.engine.torch_engine.attention import PagedAttention
from diptych.engine.torch_engine.checkpoint import Checkpoint
from diptych.engine.torch_engine.dense_view import DenseView
from diptych.engine.torch_engine.kv_cache import KVCache
from diptych.engine.torch_engine.links import ALONE, Links
from diptych.engine.torch_engine.model import Decoder
from diptych.engine.torch_engine.narrowing import Narrowing, NothingLeft
from diptych.engine.torch_engine.plan import StepPlan, plan_step
from diptych.engine.torch_engine.sampler import Sampler
from diptych.engine.torch_engine.shard import Shard
from diptych.engine.torch_engine.weight_files import WeightFiles
from diptych.engine.torch_engine.weights import OnProgress, load_weights

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# All ranks of a worker together may take that many bytes for a second copy of contexts that decode (`dense_view`).
DENSE_LIMIT = 512 << 20


def open_weights(checkpoint: Checkpoint, device: torch.device) -> WeightFiles:
    """The tensors of a checkpoint, to be read as what it is served in."""
    return WeightFiles(checkpoint.directory, checkpoint.config, TORCH_DTYPES[checkpoint.dtype], device)


class Stage:
    """One rank's part in every step. On a CUDA device its KV lies in device memory, whatever `take_kv` is given."""

    def __init__(
        self,
        files: WeightFiles,
        shard: Shard,
        device: torch.device,
        links: Links = ALONE,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._shard = shard
        self._layout = shard.own_layout
        self._device = device
        self._dtype = TORCH_DTYPES[shard.layout.dtype]
        self._links = links
        self._decoder = Decoder(shard.own_config, load_weights(files, shard, links, on_progress))
        self._sampler = Sampler(shard.config.eos_token_ids)
        self._cache: KVCache | None = None
        self._view: DenseView | None = None

    def take_kv(self, num_blocks: int, buffer: memoryview, dense_limit: int) -> None:
        """Take this rank's KV memory. `dense_limit` bounds the dense view, in bytes."""
        if self._device.type == "cpu":
            storage = torch.frombuffer(buffer, dtype=self._dtype)
        else:
            storage = torch.zeros(buffer.nbytes // self._dtype.itemsize, dtype=self._dtype, device=self._device)
            dense_limit = 0
        self._cache = KVCache(self._layout, num_blocks, storage)
        self._view = DenseView(self._layout, storage, dense_limit)

    def step(
        self, batch: Batch, on_layer: OnLayer | None = None, unwanted: Unwanted | None = None
    ) -> list[SampledToken | None]:
        """As `core.ports.Engine.step`, for the layers here, numbered from 0. Only where the shard samples does it
        return tokens. A stage that is linked to others must not be told what is unwanted: all would have to leave that
        out in the same layer. Raises ServingError without KV memory, and EngineCorrupt once all is computed."""
        if self._cache is None or self._view is None:
            raise ServingError("allocate_kv comes before the first step")
        results: list[SampledToken | None] = [None] * len(batch.rows)
        if not batch.rows and self._links.exchange is None:
            return results
        with torch.inference_mode():
            plan = plan_step(batch, self._layout, self._view, self._device)
            is_last = self._shard.is_last
            attention = PagedAttention(self._cache, plan, self._layout.head_dim, on_layer, trims=is_last)
            outputs = plan.outputs if is_last else None
            narrow = None if unwanted is None else Narrowing(batch, attention, unwanted)
            try:
                hidden = self._decoder.forward(self._enter(plan), plan.positions, outputs, attention, narrow)
            except NothingLeft:
                return results
            plan = attention.plan
            for contexts in plan.dense:
                contexts.keep()
            sampled = self._leave(hidden, batch, plan)
        for row, token in zip(plan.sampling, sampled, strict=False):
            results[row] = token
        return results

    def _enter(self, plan: StepPlan) -> Tensor:
        """What the first layer here takes."""
        if self._links.receive is None:
            return self._decoder.embed(plan.token_ids)
        shape = (len(plan.token_ids), self._shard.config.hidden_size)
        hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._links.receive(hidden)
        return hidden

    def _leave(self, hidden: Tensor, batch: Batch, plan: StepPlan) -> list[SampledToken]:
        """What becomes of the last layer's output: the tokens of `plan.sampling`, where they are chosen."""
        if self._links.send is not None:
            self._links.send(hidden)
            return []
        logits = self._decoder.logits(hidden)
        if not self._shard.samples:
            return []
        return self._sampler.sample(logits, [batch.rows[row].sequence for row in plan.sampling])

    def forget(self, request_id: str) -> None:
        """See `core.ports.Engine`."""
        self._sampler.forget(request_id)
        if self._view is not None:
            self._view.forget(request_id)

    def close(self) -> None:
        """Let go of the KV bytes, so that their owner can free them."""
        self._cache = self._view = None
