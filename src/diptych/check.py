"""`diptych check A B`: on paper, can KV pass from a worker A to a worker B, and in how many pieces.

A and B are each a JSON or TOML file that holds a worker's manifest or only its KV layout, or a short text
such as `tp=4,block=16`: what it does not say is as in the model directory given beside it, or 1.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from diptych.core.blocks import blocks_for
from diptych.core.errors import ConfigError, in_words
from diptych.core.fleet import Manifest, ModelInfo
from diptych.core.kv_layout import KVLayout, SequenceKV, TransferPlan
from diptych.policy.compatibility import model_differences
from diptych.policy.digest_units import digest_units
from diptych.policy.resharding import incompatibilities, plan_resharding

SHORT_NAMES = {
    "layers": "num_layers",
    "heads": "num_kv_heads",
    "dim": "head_dim",
    "latent": "latent_dim",
    "dtype": "dtype",
    "block": "block_size",
    "tp": "tensor_parallel",
    "pp": "pipeline_parallel",
    "dp": "data_parallel",
    "ep": "expert_parallel",
}
NEEDED = {name: SHORT_NAMES[name] for name in ("layers", "dtype")}
MAX_PAIRS_SHOWN = 16


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two workers."""

    layout: KVLayout
    model: ModelInfo | None = None  # where a manifest gives it


def read_side(text: str, model: Path | None = None) -> Side:
    """Understand one argument. Raises ConfigError saying what is wrong with it."""
    try:
        if text.endswith((".json", ".toml")):
            return _from_file(Path(text))
        values = {**_model_shape(model), **_short(text)}
        if missing := sorted(name for name, field in NEEDED.items() if field not in values):
            raise ValueError(f"it does not say {', '.join(missing)}; add them, or give --model")
        return Side(msgspec.convert(values, KVLayout))
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"{text or 'nothing'}: {in_words(error)}") from error


def mismatches(source: Side, target: Side) -> list[str]:
    """Why a router would not have these two in one fleet. Empty: they can hand over to each other."""
    reasons = incompatibilities(source.layout, target.layout)
    if source.model is not None and target.model is not None:
        reasons += model_differences(source.model, target.model)
    return reasons


def report(source: Side, target: Side, num_tokens: int) -> Iterator[str]:
    """What there is to say, line by line; the plan is that of a prompt of `num_tokens` tokens."""
    for name, side in (("A", source), ("B", target)):
        yield f"{name}  {_describe(side.layout)}, digest {side.layout.digest}"
    reasons = mismatches(source, target)
    if reasons:
        yield "incompatible"
        yield from (f"  {reason}" for reason in reasons)
        return
    yield "compatible" + (", nothing to re-shard" if source.layout.digest == target.layout.digest else "")
    in_a_row, scattered = (_plan(source.layout, target.layout, num_tokens, gap) for gap in (1, 2))
    pairs = list(dict.fromkeys((part.source_rank, part.target_rank) for part in in_a_row.layers))
    shown = " ".join(f"{ours}>{theirs}" for ours, theirs in pairs[:MAX_PAIRS_SHOWN])
    moved = sum(span.length for part in in_a_row.layers for span in part.ranges)
    num_layers = source.layout.num_layers
    units = digest_units(source.layout, target.layout, range(num_tokens))
    yield f"  bytes per token  {source.layout.token_bytes:,}"
    yield f"  rank pairs       {len(pairs)}: {shown}{' ...' if len(pairs) > MAX_PAIRS_SHOWN else ''}"
    yield f"for {num_tokens:,} tokens"
    yield f"  bytes moved      {moved:,}"
    yield f"  ranges per layer {_num_ranges(in_a_row):,} with blocks in a row, {_num_ranges(scattered):,} scattered"
    yield f"  digests          {len(units) * num_layers:,} ({len(units):,} per layer)"


def _from_file(path: Path) -> Side:
    text = path.read_text(encoding="utf-8")
    content: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("neither a manifest nor a layout")
    if "layout" in content:
        manifest = msgspec.convert(content, Manifest)
        return Side(manifest.layout, manifest.model)
    if unknown := sorted(content.keys() - {field.name for field in fields(KVLayout)}):
        raise ValueError(f"a layout has no {unknown[0]!r}")
    return Side(msgspec.convert(content, KVLayout))


def _short(text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.strip().partition("=")
        if name not in SHORT_NAMES or not equals:
            raise ValueError(f"{item!r} is none of {', '.join(f'{known}=...' for known in SHORT_NAMES)}")
        if name != "dtype" and not value.isdecimal():
            raise ValueError(f"{name} is a whole number, not {value!r}")
        values[SHORT_NAMES[name]] = value if name == "dtype" else int(value)
    return values


def _model_shape(model: Path | None) -> dict[str, Any]:
    """The part of a layout that does not depend on the cut, and the usual block size."""
    if model is None:
        return {"block_size": 16}
    from diptych.engine.torch_engine.config import load_config  # slow to import

    config = load_config(model)
    return {
        "num_layers": config.num_layers,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "dtype": config.dtype,
        "block_size": 16,
    }


def _describe(layout: KVLayout) -> str:
    heads = f"{layout.heads} KV heads of {layout.head_dim}"
    vectors = f"latents of {layout.latent_dim}" if layout.latent_dim else heads
    cut = " ".join(f"{name.upper()} {getattr(layout, SHORT_NAMES[name])}" for name in ("tp", "pp", "dp", "ep"))
    copies = f", {layout.replication} copies" if layout.replication > 1 else ""
    return f"{cut}{copies}, blocks of {layout.block_size}; {layout.num_layers} layers, {vectors}, {layout.dtype}"


def _plan(source: KVLayout, target: KVLayout, num_tokens: int, gap: int) -> TransferPlan:
    def table(layout: KVLayout) -> SequenceKV:
        return SequenceKV(layout, range(0, gap * blocks_for(num_tokens, layout.block_size), gap))

    return plan_resharding(table(source), table(target), range(num_tokens))


def _num_ranges(plan: TransferPlan) -> int:
    return sum(len(part.ranges) for part in plan.layers if part.layer == 0)
