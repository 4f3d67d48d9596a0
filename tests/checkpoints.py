"""Small Hugging Face checkpoints with random weights, one per family that the torch engine serves.

Weights are drawn large, so that greedy choices are clear-cut and the output is not one token repeated.
The tokenizer is byte-level: token ids 0 to 3 are special, 4 to 259 are bytes; the rest are spare ids,
so that the vocabulary is not a power of two away from the tokenizer's.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

EOS_TOKEN_ID = 1
SPECIAL_TOKENS = ("<bos>", "<eos>", "<user>", "<assistant>")

CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{{ '<assistant>' if message['role'] == 'assistant' else '<user>' }}{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

_SHARED: dict[str, Any] = {
    "vocab_size": 509,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": EOS_TOKEN_ID,
    "tie_word_embeddings": False,
}

# family -> (transformers' class prefix, what differs from the shared configuration)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": (
        "Llama",
        {
            "num_attention_heads": 8,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("Mistral", {"head_dim": 24, "sliding_window": None, "num_key_value_heads": 1}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 8}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rms_norm_eps": 1e-5}),
    "qwen3moe": (
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "yarn": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
}


def make_checkpoint(family: str, directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a checkpoint of `family` (a key of FAMILIES) to a subdirectory of `directory`; returns its path.

    `overrides` go into config.json, but for three that are how the weights are saved: `dtype` (default
    "float32"), `max_shard_size` and `fused_experts` (default False: one tensor per projection).
    The same arguments give the same bytes; existing ones are reused.
    """
    name = "-".join([family, str(seed), *(f"{key}={value}" for key, value in sorted(overrides.items()))])
    path = directory / "".join(c if c.isalnum() or c in "-=._" else "_" for c in name)
    if not (path / "config.json").exists():
        _write_model(family, path, seed, overrides)
        write_tokenizer(path)
    return path


def _write_model(family: str, path: Path, seed: int, overrides: dict[str, Any]) -> None:
    import torch
    import transformers

    prefix, differences = FAMILIES[family]
    settings = {**_SHARED, **differences, **overrides}
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    max_shard_size = settings.pop("max_shard_size", "1GB")
    fused_experts = settings.pop("fused_experts", False)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # zero otherwise, which would hide a forgotten bias
                torch.nn.init.normal_(parameter, std=0.2)
            elif parameter.dim() == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size, save_original_format=not fused_experts)


def write_tokenizer(path: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of the byte-level tokenizer."""
    (path / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@cache
def _tokenizer_json() -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer.to_str()
