"""A rank's share of a checkpoint's tensors, fused, and put on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diptych.engine.torch_engine.config import ExpertsConfig
from diptych.engine.torch_engine.experts import (
    ColumnOfExperts,
    ComputeExperts,
    LocalExperts,
    MixtureOfExperts,
    Router,
    SpreadExperts,
)
from diptych.engine.torch_engine.linear import Linear, Project, Then
from diptych.engine.torch_engine.links import Links
from diptych.engine.torch_engine.mlp import FeedForward, SwiGLU
from diptych.engine.torch_engine.shard import Shard
from diptych.engine.torch_engine.tensor_names import EXPERT_NAMES, FUSED_DOWN, FUSED_GATE_UP, FUSED_ROUTER
from diptych.engine.torch_engine.weight_files import Part, WeightFiles

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer. `qkv` yields query, key and value heads in that order."""

    input_norm: Tensor
    qkv: Project
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Project
    mlp_norm: Tensor
    mlp: FeedForward


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All parameters of a decoder, or of a run of its layers, in one dtype on one device. Only where the first
    layer is, there is an embedding [vocab_size, hidden]; only where the last one is, a norm and a head."""

    layers: tuple[LayerWeights, ...]
    embedding: Tensor | None
    norm: Tensor | None
    head: Project | None


def load_weights(files: WeightFiles, shard: Shard, links: Links, on_progress: OnProgress | None = None) -> ModelWeights:
    """Read and fuse what `shard` holds. `on_progress(done, total)` counts layers, embeddings being one more."""
    total = len(shard.layers) + 1
    layers = []
    for done, index in enumerate(shard.layers, start=1):
        layers.append(_Layer(files, index, shard, links).load())
        if on_progress is not None:
            on_progress(done, total)
    embedding = files.read(("model.embed_tokens.weight",)) if shard.is_first else None
    norm = files.read(("model.norm.weight",)) if shard.is_last else None
    head = _load_head(files, shard, links, embedding) if shard.is_last else None
    if on_progress is not None:
        on_progress(total, total)
    return ModelWeights(tuple(layers), embedding, norm, head)


def _load_head(files: WeightFiles, shard: Shard, links: Links, embedding: Tensor | None) -> Project:
    name = "model.embed_tokens.weight" if shard.config.tied_embeddings else "lm_head.weight"
    if links.gather is None:
        tied = embedding if shard.config.tied_embeddings else None
        return Linear(files.read((name,)) if tied is None else tied, None)
    tokens = shard.vocabulary
    weight = files.read((name, tokens))
    filled_up = weight.new_zeros(len(tokens), weight.shape[1])
    filled_up[: len(weight)] = weight
    return Then(Linear(filled_up, None), links.gather)


class _Layer:
    """Loads one decoder layer. Where tensor ranks share its work, they add up what each has come to: so the
    weights' outputs are cut first, then, in the projection that follows, the inputs."""

    def __init__(self, files: WeightFiles, index: int, shard: Shard, links: Links) -> None:
        self._files = files
        self._index = index
        self._prefix = f"model.layers.{index}."
        self._shard = shard
        self._links = links
        self._hidden = range(shard.config.hidden_size)

    def load(self) -> LayerWeights:
        config = self._shard.config
        queries, keys = self._elements(self._shard.query_heads), self._elements(self._shard.kv_heads)
        qkv = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)]
        output = self._input_cut("self_attn.o_proj", queries, biased=config.output_bias)
        return LayerWeights(
            input_norm=self._read("input_layernorm.weight"),
            qkv=self._output_cut(*qkv, biased=config.qkv_bias),
            q_norm=self._read("self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=self._read("self_attn.k_norm.weight") if config.qk_norm else None,
            output=self._added_up(output),
            mlp_norm=self._read("post_attention_layernorm.weight"),
            mlp=self._added_up(self._feed_forward()),
        )

    def _elements(self, heads: range) -> range:
        dim = self._shard.config.head_dim
        return range(heads.start * dim, heads.stop * dim)

    def _added_up(self, partial: Project) -> Project:
        return partial if self._links.add_up is None else Then(partial, self._links.add_up)

    def _feed_forward(self) -> FeedForward:
        config = self._shard.config
        experts = config.experts_of(self._index)
        if experts is not None:
            return self._mixture(experts)
        inner = self._shard.part(config.intermediate_size)
        gate_up = self._output_cut(("mlp.gate_proj", inner), ("mlp.up_proj", inner), biased=config.mlp_bias)
        return SwiGLU(gate_up, self._input_cut("mlp.down_proj", inner, biased=config.mlp_bias))

    def _mixture(self, config: ExpertsConfig) -> MixtureOfExperts:
        shard = self._shard
        inner = range(config.intermediate_size) if shard.spreads_experts else shard.part(config.intermediate_size)
        if self._files.fused_experts:
            gate = FUSED_ROUTER
            experts = [self._fused_expert(expert, inner, config) for expert in shard.experts(config)]
        else:
            gate = EXPERT_NAMES[shard.config.architecture].router
            experts = [self._expert(expert, inner) for expert in shard.experts(config)]
        compute: ComputeExperts = LocalExperts(experts)
        if shard.spreads_experts and self._links.exchange is not None:
            compute = SpreadExperts(shard.layout.data_parallel, self._links.exchange, compute)
        column = shard.column_experts(config)
        if len(column) < config.num_experts:
            compute = ColumnOfExperts(column, compute)
        router = Router(Linear(self._read(f"{gate}.weight"), None), config.per_token, config.normalized)
        return MixtureOfExperts(router, config.num_experts, compute)

    def _expert(self, expert: int, inner: range) -> SwiGLU:
        names = EXPERT_NAMES[self._shard.config.architecture]
        gate, up = names.gate_up_of(expert)
        return SwiGLU(self._output_cut((gate, inner), (up, inner)), self._input_cut(names.down_of(expert), inner))

    def _fused_expert(self, expert: int, inner: range, config: ExpertsConfig) -> SwiGLU:
        size, name = config.intermediate_size, self._prefix + FUSED_GATE_UP
        up = range(size + inner.start, size + inner.stop)
        gate_up = self._files.read((name, expert, inner), (name, expert, up))
        down = self._files.read((self._prefix + FUSED_DOWN, expert, self._hidden, inner))
        return SwiGLU(Linear(gate_up, None), Linear(down, None))

    def _read(self, name: str) -> Tensor:
        return self._files.read((self._prefix + name,))

    def _output_cut(self, *parts: tuple[str, range], biased: bool = False) -> Linear:
        """Projections of the same rows, as one: those of their outputs that are given."""

        def read(suffix: str) -> Tensor:
            named: list[Part] = [(f"{self._prefix}{name}.{suffix}", outputs) for name, outputs in parts]
            return self._files.read(*named)

        return Linear(read("weight"), read("bias") if biased else None)

    def _input_cut(self, name: str, inputs: range, biased: bool = False) -> Linear:
        """A projection of the inputs given. One of the tensor ranks has the bias, since their results are added."""
        weight = self._files.read((f"{self._prefix}{name}.weight", self._hidden, inputs))
        return Linear(weight, self._read(f"{name}.bias") if biased and self._shard.tensor_rank == 0 else None)
