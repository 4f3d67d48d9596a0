"""What the loader accepts, and how it says no."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_harness import GREEDY, Harness, checkpoint, expected_tokens, random_prompt

from diptych.core.errors import CheckpointError, ConfigError, EngineCorrupt, ServingError
from diptych.core.sequence import Batch, ScheduledSequence
from diptych.engine.torch_engine.config import parse_config
from diptych.engine.torch_engine.runner import TorchEngine

EditWeights = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A llama checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


def edit_config(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    return directory


def edit_weights(directory: Path, edit: EditWeights) -> Path:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_model_info_and_layout() -> None:
    engine = TorchEngine.load(checkpoint("qwen3"), max_model_len=1000)
    assert engine.model.name == checkpoint("qwen3").name
    assert engine.model.vocab_size == 509
    assert engine.model.max_model_len == 1000
    assert engine.model.eos_token_ids == (1,)
    layout = engine.layout
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == (3, 2, 32)
    assert (layout.dtype, layout.block_size) == ("float32", 16)
    assert TorchEngine.load(checkpoint("qwen3"), dtype="bfloat16").layout.dtype == "bfloat16"


def test_generation_config_overrides_the_end_of_sequence_tokens(directory: Path) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert TorchEngine.load(directory).model.eos_token_ids == (1, 7)


def test_shards_give_the_same_model_as_one_file(tmp_path: Path) -> None:
    sharded = checkpoint("linear", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert TorchEngine.load(sharded).model.digest == TorchEngine.load(checkpoint("linear")).model.digest
    copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
    sorted(copy.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002"):
        TorchEngine.load(copy)


def test_an_index_may_not_leave_its_directory(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its directory"):
        TorchEngine.load(directory)


def test_digest_tells_models_apart(directory: Path) -> None:
    digest = TorchEngine.load(directory).model.digest
    assert TorchEngine.load(checkpoint("llama")).model.digest == digest
    assert TorchEngine.load(checkpoint("llama", seed=1)).model.digest != digest
    (directory / "tokenizer.json").write_text("{}")
    assert TorchEngine.load(directory).model.digest != digest


def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    TorchEngine.load(checkpoint("llama"), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_old_spelling_of_rope_scaling(directory: Path) -> None:
    shutil.rmtree(directory)
    shutil.copytree(checkpoint("llama3"), directory)
    raw = json.loads((directory / "config.json").read_text())
    rope = raw["rope_parameters"]
    theta = rope.pop("rope_theta")
    old = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    edit_config(directory, rope_parameters=..., rope_scaling=old, rope_theta=theta)
    old_config = parse_config(json.loads((directory / "config.json").read_text()))
    assert old_config == parse_config(raw)


def test_yarn_may_state_the_length_before_stretching() -> None:
    raw = json.loads((checkpoint("yarn") / "config.json").read_text())
    assert parse_config({**raw, "max_position_embeddings": 256}).max_len == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures.*LlamaForCausalLM.*Qwen3ForCausalLM"),
        ({"architectures": ...}, "architectures"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads.*divisor"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"eos_token_id": "<eos>"}, "eos_token_id"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type.*dynamic.*llama3, yarn",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_hidden_layers": 4}, "lacks 9 tensors"),
        ({"num_hidden_layers": 2}, "unexpected 9 tensors"),
        ({"intermediate_size": 96}, r"gate_proj.weight has shape \(112, 64\); the config implies \(96, 64\)"),
        ({"attention_bias": True}, "lacks 12 tensors"),
    ],
)
def test_config_errors_name_the_field(directory: Path, changes: dict[str, Any], message: str) -> None:
    # generation_config.json would override config.json's end-of-sequence token
    (directory / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=message):
        TorchEngine.load(edit_config(directory, **changes))


def test_broken_files(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(CheckpointError, match="cannot read"):
        TorchEngine.load(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks model.safetensors"):
        TorchEngine.load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json"):
        TorchEngine.load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config.json"):
        TorchEngine.load(directory)


def test_a_name_that_is_neither_directory_nor_hub_id() -> None:
    with pytest.raises(CheckpointError, match="no directory here"):
        TorchEngine.load("/no/such/directory")


def test_integer_weights_are_refused(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match="model.norm.weight is torch.int8"):
        TorchEngine.load(directory)


def test_redundant_tensors_are_ignored(directory: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_weights(directory, lambda tensors: tensors.update(extra))
    assert TorchEngine.load(directory).model.digest == TorchEngine.load(checkpoint("llama")).model.digest


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", {"sliding_window": 1024}), ("qwen2", {"use_sliding_window": True, "sliding_window": 1024})],
)
def test_an_active_sliding_window_is_refused(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    path = edit_config(Path(shutil.copytree(checkpoint(family), tmp_path / "model")), **changes)
    with pytest.raises(CheckpointError, match="sliding_window is 1024"):
        TorchEngine.load(path)
    assert TorchEngine.load(path, max_model_len=1024).model.max_model_len == 1024


def test_operators_choices_are_checked() -> None:
    with pytest.raises(ConfigError, match="float8"):
        TorchEngine.load(checkpoint("llama"), dtype="float8")
    with pytest.raises(ConfigError, match="max_model_len is 5000"):
        TorchEngine.load(checkpoint("llama"), max_model_len=5000)


def test_a_step_needs_kv_memory() -> None:
    engine = TorchEngine.load(checkpoint("llama"))
    with pytest.raises(ServingError, match="allocate_kv"):
        engine.step(Batch(()))


def test_corrupt_kv_fails_its_request_alone_and_the_step_can_be_repeated() -> None:
    harness = Harness("llama")
    prompts = [random_prompt(20), random_prompt(30)]
    healthy, corrupt = (harness.sequence(prompt) for prompt in prompts)
    harness.step((healthy, 20), (corrupt, 30))
    size = harness.engine.layout.block_bytes
    first = corrupt.block_table[0]
    harness.memory.layer(1)[first * size : (first + 1) * size] = b"\xff" * size
    rows = tuple(ScheduledSequence(each, each.num_computed_tokens, 1, True) for each in (healthy, corrupt))
    with pytest.raises(EngineCorrupt) as caught:
        harness.engine.step(Batch(rows))
    assert caught.value.request_ids == (corrupt.request_id,)
    (token,) = harness.engine.step(Batch(rows[:1]))
    assert token is not None
    assert [*healthy.output_token_ids, token.token_id] == expected_tokens("llama", prompts[0], 2)
    assert healthy.request.sampling == GREEDY


def test_a_closed_engine_touches_its_memory_no_more() -> None:
    harness = Harness("llama")
    sequence = harness.sequence([5, 6])
    harness.step((sequence, 2))
    harness.engine.close()
    with pytest.raises(ServingError):
        harness.step((sequence, 1))
