"""A checkpoint's tensors: found, checked against the config, fused, and put on the device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diptych.core.errors import CheckpointError
from diptych.engine.torch_engine.config import ExpertsConfig, ModelConfig
from diptych.engine.torch_engine.experts import LocalExperts, MixtureOfExperts, Router
from diptych.engine.torch_engine.linear import Linear
from diptych.engine.torch_engine.mlp import FeedForward, SwiGLU
from diptych.engine.torch_engine.tensor_names import (
    EXPERT_NAMES,
    FUSED_DOWN,
    FUSED_GATE_UP,
    FUSED_ROUTER,
    expected_shapes,
    experts_are_fused,
)

OnProgress = Callable[[int, int], None]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WANTED_FILES = ["*.json", "*.jinja", "*.safetensors"]
_OTHER_FORMATS = ["consolidated*", "original/*"]
_SAMPLES_PER_TENSOR = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer. `qkv` yields query, key and value heads in that order."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    mlp: FeedForward


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All parameters of a decoder, in one dtype on one device."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Linear


class WeightReader:
    """Reads named tensors out of one checkpoint, checking names and shapes first.

    Raises CheckpointError for a missing or unreadable file, and for tensors that are missing,
    unexpected, or of another shape than the config implies.
    """

    def __init__(self, directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._files = _open_shards(directory)
        self.fused_experts = experts_are_fused(self._files)
        self._shapes = expected_shapes(config, self.fused_experts)
        self._dtype = dtype
        self._device = device
        self._digest = hashlib.blake2b(repr(config).encode(), digest_size=16)
        _check_names(set(self._files), set(self._shapes), config)

    def read(self, *names: str) -> Tensor:
        """One tensor, or several stacked along the first dimension."""
        parts = [self._read_one(name) for name in names]
        fused = torch.cat(parts) if len(parts) > 1 else parts[0]
        return fused.to(self._device, self._dtype).contiguous()

    def digest(self, extra: bytes) -> str:
        """Names config, shapes, dtypes, a sample of every tensor read so far, and `extra`."""
        digest = self._digest.copy()
        digest.update(hashlib.blake2b(extra).digest())
        return digest.hexdigest()

    def _read_one(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"cannot read {name}: {error}") from error
        if tuple(tensor.shape) != self._shapes[name]:
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}; the config implies {self._shapes[name]}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name} is {tensor.dtype}; only floating-point weights are supported")
        flat = tensor.flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES_PER_TENSOR)].to(torch.float32)
        self._digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        self._digest.update(sample.numpy().tobytes())
        return tensor


def load_weights(reader: WeightReader, config: ModelConfig, on_progress: OnProgress | None = None) -> ModelWeights:
    """Read and fuse everything. `on_progress(done, total)` counts layers, embeddings being one more."""
    total = config.num_layers + 1
    layers = []
    for index in range(config.num_layers):
        layers.append(_load_layer(reader, index, config))
        if on_progress is not None:
            on_progress(index + 1, total)
    embedding = reader.read("model.embed_tokens.weight")
    norm = reader.read("model.norm.weight")
    lm_head = embedding if config.tied_embeddings else reader.read("lm_head.weight")
    if on_progress is not None:
        on_progress(total, total)
    return ModelWeights(embedding, tuple(layers), norm, Linear(lm_head, None))


class _LayerReader:
    """Reads the tensors of one layer, by their names below it."""

    def __init__(self, reader: WeightReader, index: int) -> None:
        self._reader = reader
        self._prefix = f"model.layers.{index}."

    def tensor(self, name: str) -> Tensor:
        return self._reader.read(self._prefix + name)

    def linear(self, *names: str, biased: bool = False) -> Linear:
        """Projections of the same rows, as one."""
        weight = self._reader.read(*(f"{self._prefix}{name}.weight" for name in names))
        bias = self._reader.read(*(f"{self._prefix}{name}.bias" for name in names)) if biased else None
        return Linear(weight, bias)

    def linears(self, name: str) -> list[Linear]:
        """One per expert, out of a tensor that holds them all."""
        return [Linear(weight, None) for weight in self.tensor(name)]


def _load_layer(reader: WeightReader, index: int, config: ModelConfig) -> LayerWeights:
    layer = _LayerReader(reader, index)
    experts = config.experts_of(index)
    if experts is None:
        gate_up = layer.linear("mlp.gate_proj", "mlp.up_proj", biased=config.mlp_bias)
        mlp: FeedForward = SwiGLU(gate_up, layer.linear("mlp.down_proj", biased=config.mlp_bias))
    elif reader.fused_experts:
        mlp = _load_fused_experts(layer, experts)
    else:
        mlp = _load_experts(layer, config.architecture, experts)
    return LayerWeights(
        input_norm=layer.tensor("input_layernorm.weight"),
        qkv=layer.linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", biased=config.qkv_bias),
        q_norm=layer.tensor("self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm=layer.tensor("self_attn.k_norm.weight") if config.qk_norm else None,
        output=layer.linear("self_attn.o_proj", biased=config.output_bias),
        mlp_norm=layer.tensor("post_attention_layernorm.weight"),
        mlp=mlp,
    )


def _load_experts(layer: _LayerReader, architecture: str, config: ExpertsConfig) -> MixtureOfExperts:
    names = EXPERT_NAMES[architecture]
    experts = [
        SwiGLU(layer.linear(*names.gate_up_of(expert)), layer.linear(names.down_of(expert)))
        for expert in range(config.num_experts)
    ]
    return _mixture(layer.linear(names.router), experts, config)


def _load_fused_experts(layer: _LayerReader, config: ExpertsConfig) -> MixtureOfExperts:
    pairs = zip(layer.linears(FUSED_GATE_UP), layer.linears(FUSED_DOWN), strict=True)
    return _mixture(layer.linear(FUSED_ROUTER), [SwiGLU(gate_up, down) for gate_up, down in pairs], config)


def _mixture(gate: Linear, experts: list[SwiGLU], config: ExpertsConfig) -> MixtureOfExperts:
    router = Router(gate, config.per_token, config.normalized)
    return MixtureOfExperts(router, config.num_experts, LocalExperts(experts))


def _open_shards(directory: Path) -> dict[str, Any]:
    """The open file that holds each tensor, by tensor name."""
    files: dict[str, Any] = {}
    for path in _shard_paths(directory):
        if not path.is_file():
            raise CheckpointError(f"{directory} lacks {path.name}")
        try:
            shard: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        files |= dict.fromkeys(shard.keys(), shard)
    return files


def _shard_paths(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.exists():
        return [directory / _SINGLE]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {index}: {error!r}") from error
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{index} points outside its directory")
    return [directory / name for name in sorted(names)]


def _check_names(found: set[str], expected: set[str], config: ModelConfig) -> None:
    # Old checkpoints store rotary tables, and tied ones may store the shared matrix twice.
    redundant = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if config.tied_embeddings:
        redundant.add("lm_head.weight")
    for names, problem in ((expected - found, "lacks"), (found - expected - redundant, "has unexpected")):
        if names:
            listed = ", ".join(sorted(names)[:5])
            raise CheckpointError(f"the checkpoint {problem} {len(names)} tensors for its config: {listed}")
