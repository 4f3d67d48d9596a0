"""config.json of a Hugging Face checkpoint, as far as this engine understands it. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.core.errors import CheckpointError

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Family:
    """In which ways a model family departs from Llama."""

    qk_norm: bool = False
    qkv_bias: bool | None = None  # None: config.json says (`attention_bias`)
    window_switch: bool = True  # whether a `sliding_window` counts only with `use_sliding_window`
    experts: bool = False
    rope_theta: float = 10_000.0  # where config.json has none


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(qkv_bias=False, window_switch=False),
    "MixtralForCausalLM": Family(qkv_bias=False, window_switch=False, experts=True, rope_theta=1e6),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norm=True),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, experts=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """One rotary embedding. Fields beyond `kind` and `theta` are read only by the kinds that need them."""

    kind: str = "default"  # default | linear | llama3 | yarn
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_len: int = 0  # llama3, yarn: tokens seen in pretraining
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn; derived from `factor` if absent
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """The mixture that takes the place of the MLP in the layers listed."""

    layers: tuple[int, ...]
    num_experts: int
    per_token: int
    intermediate_size: int  # of one expert
    normalized: bool  # whether the weights of a token's experts are scaled to add up to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder. All sizes in elements; `dtype` is the checkpoint's own, by torch's name."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    sliding_window: int | None
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    experts: ExpertsConfig | None
    dtype: str
    eos_token_ids: tuple[int, ...]

    @property
    def max_len(self) -> int:
        """Tokens that the position embedding is good for. A YaRN config may state the length before stretching."""
        if self.rope.kind == "yarn":
            return max(self.max_position_embeddings, int(self.rope.factor * self.rope.original_max_len))
        return self.max_position_embeddings

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """The mixture in that layer; None where it has an MLP."""
        return self.experts if self.experts is not None and layer in self.experts.layers else None


def load_config(directory: Path) -> ModelConfig:
    """Read config.json and generation_config.json. Raises CheckpointError naming the field at fault."""
    raw = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
    return parse_config(raw, eos_token_id=eos)


def parse_config(raw: Mapping[str, Any], eos_token_id: object = None) -> ModelConfig:
    """The typed form of a config.json. `eos_token_id`, if given, overrides the one in `raw`."""
    architecture = _architecture(raw)
    _refuse_unsupported(raw)
    family = FAMILIES[architecture]
    attention_bias = bool(raw.get("attention_bias", False))
    num_heads = _size(raw, "num_attention_heads")
    num_kv_heads = _size(raw, "num_key_value_heads", num_heads)
    hidden_size = _size(raw, "hidden_size")
    head_dim = _size(raw, "head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise _wrong("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    if head_dim % 2:
        raise _wrong("head_dim", head_dim, "an even number, for rotary embedding")
    max_positions = _size(raw, "max_position_embeddings", 2048)
    return ModelConfig(
        architecture=architecture,
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(raw, "intermediate_size"),
        num_layers=_size(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, max_positions, family.rope_theta),
        max_position_embeddings=max_positions,
        sliding_window=_sliding_window(raw, family),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=architecture == "LlamaForCausalLM" and bool(raw.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        experts=_experts(raw, architecture) if family.experts else None,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        eos_token_ids=_eos(raw.get("eos_token_id") if eos_token_id is None else eos_token_id),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; is it a Hugging Face model directory?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return raw


def _wrong(name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"config.json: {name} is {value!r}; it must be {wanted}")


def _architecture(raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures")
    if isinstance(named, list):
        for architecture in named:
            if architecture in FAMILIES:
                return str(architecture)
    raise _wrong("architectures", named, f"one of those supported: {', '.join(FAMILIES)}")


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("quantization_config"):
        raise _wrong("quantization_config", "set", "absent: quantized checkpoints are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise _wrong("hidden_act", raw["hidden_act"], "'silu'")


def _size(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(name, value, "a positive integer")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _wrong(name, value, "a positive number")
    return float(value)


def _experts(raw: Mapping[str, Any], architecture: str) -> ExpertsConfig:
    """Both spellings of the number of experts: which of the two depends on what saved the checkpoint."""
    count_name = "num_experts" if "num_experts" in raw else "num_local_experts"
    num_experts = _size(raw, count_name)
    per_token = _size(raw, "num_experts_per_tok")
    if per_token > num_experts:
        raise _wrong("num_experts_per_tok", per_token, f"at most {count_name} ({num_experts})")
    num_layers = _size(raw, "num_hidden_layers")
    mixtral = architecture == "MixtralForCausalLM"
    return ExpertsConfig(
        layers=tuple(range(num_layers)) if mixtral else _sparse_layers(raw, num_layers),
        num_experts=num_experts,
        per_token=per_token,
        intermediate_size=_size(raw, "intermediate_size" if mixtral else "moe_intermediate_size"),
        normalized=mixtral or bool(raw.get("norm_topk_prob", False)),
    )


def _sparse_layers(raw: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Every `decoder_sparse_step`-th layer, counting from one, but for those in `mlp_only_layers`."""
    step = _size(raw, "decoder_sparse_step", 1)
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(not isinstance(layer, int) or isinstance(layer, bool) for layer in dense):
        raise _wrong("mlp_only_layers", dense, "a list of layer numbers")
    return tuple(layer for layer in range(step - 1, num_layers, step) if layer not in dense)


def _rope(raw: Mapping[str, Any], max_positions: int, default_theta: float) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5) or `rope_theta` beside `rope_scaling` (before)."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise _wrong("rope_parameters", given, "an object")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise _wrong("rope_type", kind, f"one of those supported: {', '.join(ROPE_KINDS)}")
    partial = given.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise _wrong("partial_rotary_factor", partial, "1.0: partial rotation is not supported")
    original = _size(given, "original_max_position_embeddings", max_positions)
    original = _size(raw, "original_max_position_embeddings", original)
    default = RopeConfig()
    if kind != "default" and given.get("factor") is None and not (kind == "yarn" and original < max_positions):
        raise _wrong("rope factor", None, f"set for rope_type {kind!r}")
    return RopeConfig(
        kind=kind,
        theta=_number(given, "rope_theta", _number(raw, "rope_theta", default_theta)),
        factor=_number(given, "factor", max_positions / original),
        original_max_len=original,
        low_freq_factor=_number(given, "low_freq_factor", default.low_freq_factor),
        high_freq_factor=_number(given, "high_freq_factor", default.high_freq_factor),
        attention_factor=_number(given, "attention_factor", 0.0) or None,
        beta_fast=_number(given, "beta_fast", default.beta_fast),
        beta_slow=_number(given, "beta_slow", default.beta_slow),
        mscale=_number(given, "mscale", default.mscale),
        mscale_all_dim=_number(given, "mscale_all_dim", default.mscale_all_dim),
        truncate=bool(given.get("truncate", default.truncate)),
    )


def _sliding_window(raw: Mapping[str, Any], family: Family) -> int | None:
    """The window in tokens if any layer would use one. Qwen carries a number that a switch turns on."""
    switched_on = not family.window_switch or bool(raw.get("use_sliding_window", False))
    if switched_on and raw.get("sliding_window") is not None:
        return _size(raw, "sliding_window")
    return None


def _eos(value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(token, int) or isinstance(token, bool) for token in ids):
        raise _wrong("eos_token_id", value, "a token id or a list of them")
    return tuple(ids)
