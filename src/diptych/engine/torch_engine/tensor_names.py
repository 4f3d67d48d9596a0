"""What a checkpoint's tensors are called and how they are shaped, by family."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from diptych.engine.torch_engine.config import ExpertsConfig, ModelConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Names of a mixture's tensors, below those of its layer: `block`.gate, and for each expert
    `block`.experts.N with these three projections."""

    block: str
    gate: str
    up: str
    down: str

    @property
    def router(self) -> str:
        return f"{self.block}.gate"

    def gate_up_of(self, expert: int) -> tuple[str, str]:
        """The two projections that are fused into one, without their suffix `.weight`."""
        prefix = f"{self.block}.experts.{expert}."
        return prefix + self.gate, prefix + self.up

    def down_of(self, expert: int) -> str:
        return f"{self.block}.experts.{expert}.{self.down}"


EXPERT_NAMES = {
    "MixtralForCausalLM": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen3MoeForCausalLM": ExpertNames("mlp", "gate_proj", "up_proj", "down_proj"),
}

# `transformers` 5 keeps the experts of a layer in two tensors, and can save them so.
FUSED_ROUTER = "mlp.gate"
FUSED_GATE_UP = "mlp.experts.gate_up_proj"
FUSED_DOWN = "mlp.experts.down_proj"


def experts_are_fused(names: Iterable[str]) -> bool:
    """Whether a checkpoint of those tensors has each layer's experts in one piece."""
    return any(name.endswith(FUSED_GATE_UP) for name in names)


def expected_shapes(config: ModelConfig, fused_experts: bool) -> Shapes:
    """Every tensor that a checkpoint of this config must hold, by its Hugging Face name."""
    hidden = config.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    shared = _attention(config)
    for index in range(config.num_layers):
        experts = config.experts_of(index)
        layer = shared | (_dense(config) if experts is None else _mixture(config, experts, fused_experts))
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _attention(config: ModelConfig) -> Shapes:
    """One layer but for its feed-forward."""
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.qkv_bias:
        shapes |= {"self_attn.q_proj.bias": (queries,), "self_attn.k_proj.bias": (keys,)}
        shapes["self_attn.v_proj.bias"] = (keys,)
    if config.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    return shapes


def _dense(config: ModelConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: Shapes = {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.mlp_bias:
        shapes |= {"mlp.gate_proj.bias": (inner,), "mlp.up_proj.bias": (inner,), "mlp.down_proj.bias": (hidden,)}
    return shapes


def _mixture(config: ModelConfig, experts: ExpertsConfig, fused: bool) -> Shapes:
    hidden, inner, count = config.hidden_size, experts.intermediate_size, experts.num_experts
    if fused:
        return {
            f"{FUSED_ROUTER}.weight": (count, hidden),
            FUSED_GATE_UP: (count, 2 * inner, hidden),
            FUSED_DOWN: (count, hidden, inner),
        }
    names = EXPERT_NAMES[config.architecture]
    shapes: Shapes = {f"{names.router}.weight": (count, hidden)}
    for expert in range(count):
        shapes |= {f"{name}.weight": (inner, hidden) for name in names.gate_up_of(expert)}
        shapes[f"{names.down_of(expert)}.weight"] = (hidden, inner)
    return shapes
