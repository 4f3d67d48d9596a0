"""The one attention entry: causal, grouped-query, over paged keys and values.

Two matrix products with a softmax between them, query heads of a group folded into rows: on CPUs much
faster than `scaled_dot_product_attention`, which handles one query row per head badly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.core.ports import OnLayer
from diptych.engine.torch_engine.kv_cache import KVCache
from diptych.engine.torch_engine.plan import DecodeGroup, PrefillChunk, StepPlan

# Query tokens of a prefill that attend together. Fewer make the products inefficient; more compute
# more scores above the diagonal, and spill them from cache.
QUERY_CHUNK = 128


class PagedAttention:
    """Attention for one step: writes each layer's keys and values, reports that, then attends. With `trims`,
    only tokens that sample attend in the last layer. `plan` may be narrowed between layers."""

    def __init__(self, cache: KVCache, plan: StepPlan, head_dim: int, on_layer: OnLayer | None, trims: bool) -> None:
        self._cache = cache
        self.plan = plan
        self._scale = head_dim**-0.5
        self._on_layer = on_layer
        self._trimmed_layer = cache.num_layers - 1 if trims else None

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `model.Attend`."""
        self._cache.write(layer, self.plan.writes, keys, values)
        if self._on_layer is not None:
            self._on_layer(layer)
        num_tokens, num_heads, head_dim = queries.shape
        num_kv_heads = keys.shape[1]
        queries = queries.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
        attended = torch.empty_like(queries, memory_format=torch.contiguous_format)
        for group in self.plan.decodes:
            some = group.tokens
            attended[some] = self._decode(layer, group, queries[some], (keys[some], values[some]))
        for chunk in self.plan.prefills:
            self._prefill(layer, chunk, queries[chunk.tokens], attended[chunk.tokens])
        return attended.view(num_tokens, num_heads * head_dim)

    def _decode(self, layer: int, group: DecodeGroup, queries: Tensor, new: tuple[Tensor, Tensor]) -> Tensor:
        """One token per sequence: queries [N, num_kv_heads, group, head_dim], and the same back. Their own
        keys and values are `new`."""
        keys, values = group.contexts.load(self._cache, layer, *new)
        scores = self._scores(queries.flatten(0, 1), keys)
        if group.unused is not None:
            last = scores.view(len(queries), -1, scores.shape[-1])[..., -group.unused.shape[-1] :]
            last.masked_fill_(group.unused, -torch.inf)
        return torch.matmul(scores.softmax(dim=-1), values).view(queries.shape)

    def _prefill(self, layer: int, chunk: PrefillChunk, queries: Tensor, attended: Tensor) -> None:
        """Many tokens of one sequence: queries [T, num_kv_heads, group, head_dim], results into `attended`."""
        num_tokens, num_kv_heads, group, head_dim = queries.shape
        wanted = int(chunk.samples) if layer == self._trimmed_layer else num_tokens
        if not wanted:
            return
        keys, values = self._cache.gather(layer, chunk.gather, 1)
        future = _future(min(QUERY_CHUNK, wanted), queries)
        for first in range(num_tokens - wanted, num_tokens, QUERY_CHUNK):
            some = queries[first : first + QUERY_CHUNK]
            visible = chunk.start + first + len(some)
            rows = some.permute(1, 2, 0, 3).reshape(num_kv_heads, group * len(some), head_dim)
            scores = self._scores(rows, keys[:, :visible])
            by_token = scores.view(num_kv_heads, group, len(some), visible)
            by_token[..., visible - len(some) :] += future[: len(some), : len(some)]
            result = torch.matmul(scores.softmax(dim=-1), values[:, :visible])
            attended[first : first + QUERY_CHUNK] = result.view(num_kv_heads, group, -1, head_dim).permute(2, 0, 1, 3)

    def _scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Scaled products [heads, rows, slots] of queries [heads, rows, dim] and keys [heads, slots, dim]."""
        ignored = queries.new_empty(1, 1, 1)
        return torch.baddbmm(ignored, queries, keys.transpose(1, 2), beta=0, alpha=self._scale)


def _future(size: int, like: Tensor) -> Tensor:
    """What is added to the scores of `size` tokens among themselves: minus infinity above the diagonal."""
    return torch.full((size, size), -torch.inf, dtype=like.dtype, device=like.device).triu_(1)
