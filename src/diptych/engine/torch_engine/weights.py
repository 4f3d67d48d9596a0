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
from diptych.engine.torch_engine.config import ModelConfig
from diptych.engine.torch_engine.linear import Linear

OnProgress = Callable[[int, int], None]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WANTED_FILES = ["*.json", "*.jinja", "*.safetensors"]
_OTHER_FORMATS = ["consolidated*", "original/*"]
_SAMPLES_PER_TENSOR = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer. `qkv` yields query, key and value heads in that order; `gate_up` gate, then up."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All parameters of a decoder, in one dtype on one device."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Linear


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config must hold, by its Hugging Face name."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    biased = [("self_attn.q_proj", config.qkv_bias), ("self_attn.k_proj", config.qkv_bias)]
    biased += [("self_attn.v_proj", config.qkv_bias), ("self_attn.o_proj", config.output_bias)]
    biased += [(f"mlp.{name}_proj", config.mlp_bias) for name in ("gate", "up", "down")]
    layer |= {f"{name}.bias": layer[f"{name}.weight"][:1] for name, present in biased if present}
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


class WeightReader:
    """Reads named tensors out of one checkpoint, checking names and shapes first.

    Raises CheckpointError for a missing or unreadable file, and for tensors that are missing,
    unexpected, or of another shape than the config implies.
    """

    def __init__(self, directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._files = _open_shards(directory)
        self._shapes = expected_shapes(config)
        self._dtype = dtype
        self._device = device
        self._digest = hashlib.blake2b(repr(config).encode(), digest_size=16)
        _check_names(set(self._files), set(self._shapes), config)

    @property
    def num_tensors(self) -> int:
        return len(self._shapes)

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
        layers.append(_load_layer(reader, f"model.layers.{index}.", config))
        if on_progress is not None:
            on_progress(index + 1, total)
    embedding = reader.read("model.embed_tokens.weight")
    norm = reader.read("model.norm.weight")
    lm_head = embedding if config.tied_embeddings else reader.read("lm_head.weight")
    if on_progress is not None:
        on_progress(total, total)
    return ModelWeights(embedding, tuple(layers), norm, Linear(lm_head, None))


def _load_layer(reader: WeightReader, prefix: str, config: ModelConfig) -> LayerWeights:
    def norm(name: str) -> Tensor:
        return reader.read(f"{prefix}{name}.weight")

    def linear(biased: bool, *names: str) -> Linear:
        weight = reader.read(*(f"{prefix}{name}.weight" for name in names))
        return Linear(weight, reader.read(*(f"{prefix}{name}.bias" for name in names)) if biased else None)

    return LayerWeights(
        input_norm=norm("input_layernorm"),
        qkv=linear(config.qkv_bias, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        output=linear(config.output_bias, "self_attn.o_proj"),
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=linear(config.mlp_bias, "mlp.gate_proj", "mlp.up_proj"),
        down=linear(config.mlp_bias, "mlp.down_proj"),
    )


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
