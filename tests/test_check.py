"""`diptych check`: what it reads, what it says, and how it exits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from diptych.check import read_side
from diptych.cli import app
from diptych.core.errors import ConfigError
from diptych.core.fleet import Manifest, ModelInfo
from diptych.core.kv_layout import KVLayout

LAYOUT = KVLayout(num_layers=64, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_size=16)
SHORT = "layers=64,heads=8,dim=128,dtype=bfloat16"
MODEL = ModelInfo(name="m", digest="abc", vocab_size=32, max_model_len=64, eos_token_ids=(2,))


def check(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", *arguments])
    return result.exit_code, result.output


def test_the_missions_pair() -> None:
    code, said = check(f"{SHORT},tp=4,ep=4", f"{SHORT},dp=4,ep=4", "--tokens", "8192")
    assert code == 0
    assert replace(LAYOUT, tensor_parallel=4, expert_parallel=4).digest in said
    assert replace(LAYOUT, data_parallel=4, expert_parallel=4).digest in said
    assert [line.split(maxsplit=2) for line in said.splitlines() if "pairs" in line] == [
        ["rank", "pairs", "4: 0>0 1>0 2>0 3>0"]
    ]
    figures = dict(line.rsplit("  ", 1) for line in said.splitlines() if "  bytes " in line)
    assert [figure.strip() for figure in figures.values()] == ["262,144", "2,147,483,648"]
    assert "ranges per layer 4,096 with blocks in a row, 4,096 scattered" in said
    assert "digests          131,072 (2,048 per layer)" in said


def test_equal_layouts_need_no_resharding() -> None:
    code, said = check(SHORT, SHORT)
    assert code == 0
    assert "compatible, nothing to re-shard" in said
    assert "ranges per layer 1 with blocks in a row, 512 scattered" in said


def test_incompatible_layouts_say_why() -> None:
    code, said = check(SHORT, f"{SHORT},layers=32,dtype=float32")
    assert code == 1
    assert "incompatible\n  num_layers is 64 on one side and 32 on the other\n  dtype is " in said
    assert "ranges" not in said


def test_files_of_layouts_and_manifests(tmp_path: Path) -> None:
    manifest, other, toml = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.toml"
    manifest.write_bytes(msgspec.json.encode(Manifest(model=MODEL, layout=LAYOUT, num_blocks=9)))
    another = replace(MODEL, digest="x", max_model_len=77)
    other.write_bytes(msgspec.json.encode(Manifest(model=another, layout=LAYOUT, num_blocks=9)))
    toml.write_text("num_layers = 64\nlatent_dim = 576\ndtype = 'bfloat16'\nblock_size = 64\ntensor_parallel = 2\n")
    assert read_side(str(manifest)).layout == LAYOUT
    assert read_side(str(toml)).layout == KVLayout(
        num_layers=64, latent_dim=576, dtype="bfloat16", block_size=64, tensor_parallel=2
    )
    assert check(str(manifest), SHORT)[0] == 0
    code, said = check(str(manifest), str(other))
    assert (code, "the models differ: abc and x\n  the contexts differ: " in said) == (1, True)


def test_a_model_directory_gives_what_is_left_open(tmp_path: Path) -> None:
    shape: dict[str, object] = {
        "num_hidden_layers": 64,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "vocab_size": 32,
    }
    shape |= {"head_dim": 128, "intermediate_size": 64, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert read_side("", tmp_path).layout == LAYOUT
    assert read_side("tp=4,block=64", tmp_path).layout == replace(LAYOUT, tensor_parallel=4, block_size=64)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tp=4", "tp=4: it does not say dtype, layers; add them, or give --model"),
        (f"{SHORT},tp=x", "tp is a whole number, not 'x'"),
        (f"{SHORT},tp=3", "8 KV heads cannot be cut evenly for 3 tensor ranks"),
        (f"{SHORT},tp", "'tp' is none of layers=...,"),
        (f"{SHORT},cp=2", "'cp=2' is none of"),
        ("nowhere.json", "No such file"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_side(text)


@pytest.mark.parametrize("content", ["[1]", "{", '{"num_layers": 1}', '{"tensor_paralel": 2}', '{"layout": {}}'])
def test_a_file_that_is_no_layout_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"a\.json"):
        read_side(str(path))
