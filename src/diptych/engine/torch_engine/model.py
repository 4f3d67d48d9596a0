"""The decoder: embeddings, layers, norm, head. Where keys and values live is the caller's business."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from diptych.engine.torch_engine.config import ModelConfig
from diptych.engine.torch_engine.rope import RotaryEmbedding, rotate
from diptych.engine.torch_engine.weights import LayerWeights, ModelWeights


class Attend(Protocol):
    """Causal attention of T tokens over themselves and whatever came before them.

    Takes the layer's index (from 0, of those here), queries [T, num_heads, head_dim] and keys, values [T, num_kv_heads,
    head_dim], rotated; returns [T, num_heads * head_dim]. In the last layer only the rows of tokens that are
    wanted afterwards are read.
    """

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Narrowed:
    """Which tokens are left of a step [T'], by the numbers that they had; `outputs` numbers those left."""

    tokens: Tensor
    positions: Tensor
    outputs: Tensor


class Decoder:
    """A pre-norm decoder with rotary positions, grouped-query attention and a feed-forward, dense or sparse; or
    a run of its layers. The heads of `config` are those of the weights."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self._config = config
        self._weights = weights
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, weights.layers[0].input_norm.device)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Vectors [T, hidden] of `token_ids` [T]: what the first layer takes."""
        if self._weights.embedding is None:
            raise ValueError("these layers are not the first ones")
        return functional.embedding(token_ids, self._weights.embedding)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        outputs: Tensor | None,
        attend: Attend,
        narrow: Callable[[], Narrowed | None] | None = None,
    ) -> Tensor:
        """Through all layers here: [T, hidden], overwritten, to [len(outputs), hidden]. `outputs` numbers the tokens
        that are still wanted afterwards (None: all). `narrow`, asked before each layer, may leave tokens out."""
        angles = self._rotary.angles(positions, hidden.dtype)
        last = len(self._weights.layers) - 1
        for index, layer in enumerate(self._weights.layers):
            if narrow is not None and (narrowed := narrow()) is not None:
                hidden, outputs = hidden[narrowed.tokens], narrowed.outputs
                angles = self._rotary.angles(narrowed.positions, hidden.dtype)
            queries, keys, values = self._project(layer, self._norm(hidden, layer.input_norm), angles)
            attended = attend(index, queries, keys, values)
            if index == last and outputs is not None:  # nobody reads the other tokens any more
                hidden, attended = hidden[outputs], attended[outputs]
            hidden += layer.output(attended)
            hidden += layer.mlp(self._norm(hidden, layer.mlp_norm))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, vocab_size] of what the last layer yields for N tokens."""
        if self._weights.norm is None or self._weights.head is None:
            raise ValueError("these layers are not the last ones")
        return self._weights.head(self._norm(hidden, self._weights.norm))

    def _project(
        self, layer: LayerWeights, normed: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        config = self._config
        first_key, first_value = config.num_heads, config.num_heads + config.num_kv_heads
        num_heads = first_value + config.num_kv_heads
        heads = layer.qkv(normed).view(len(normed), num_heads, config.head_dim)
        queries_keys, values = heads[:, :first_value], heads[:, first_value:]
        if layer.q_norm is not None and layer.k_norm is not None:
            queries = self._norm(queries_keys[:, :first_key], layer.q_norm)
            keys = self._norm(queries_keys[:, first_key:], layer.k_norm)
            queries_keys = torch.cat((queries, keys), dim=1)
        rotated = rotate(queries_keys, *angles)
        return rotated[:, :first_key], rotated[:, first_key:], values

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm (Zhang and Sennrich 2019) over the last dimension."""
        return functional.rms_norm(hidden, weight.shape, weight, self._config.rms_norm_eps)
