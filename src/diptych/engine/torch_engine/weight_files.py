"""A checkpoint's safetensors files: found, checked against the config, and read as far as somebody needs them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diptych.core.errors import CheckpointError
from diptych.engine.torch_engine.config import ModelConfig
from diptych.engine.torch_engine.tensor_names import expected_shapes, experts_are_fused

# A tensor's name, and for each of its first dimensions which part: an index or a run of them.
Part = tuple[str, *tuple[int | range, ...]]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SAMPLED_RUNS = 8  # of each tensor, for the digest
_RUN_ELEMENTS = 16


class WeightFiles:
    """Reads parts of named tensors out of one checkpoint, checking all names and shapes first.

    Raises CheckpointError for a missing or unreadable file, and for tensors that are missing,
    unexpected, or of another shape than the config implies.
    """

    def __init__(self, directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._directory = directory
        self._config = config
        self._files = _open_shards(directory)
        self.fused_experts = experts_are_fused(self._files)
        self._shapes = expected_shapes(config, self.fused_experts)
        self._dtype = dtype
        self._device = device
        _check_names(set(self._files), set(self._shapes), config)
        for name, shape in self._shapes.items():
            found = tuple(self._files[name].get_slice(name).get_shape())
            if found != shape:
                raise CheckpointError(f"{name} has shape {found}; the config implies {shape}")

    def read(self, *parts: Part) -> Tensor:
        """One part of a tensor, or several stacked along the first dimension."""
        tensors = [self._read_part(name, index) for name, *index in parts]
        fused = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return fused.to(self._device, self._dtype).contiguous()

    def digest(self) -> str:
        """Names the model, however it is cut: config, names, shapes, dtypes, a sample of every tensor, and the
        tokenizer. Reads some 500 bytes of each tensor."""
        digest = hashlib.blake2b(repr(self._config).encode(), digest_size=16)
        for name, shape in sorted(self._shapes.items()):
            tensor = self._tensor(name)
            digest.update(f"{name} {tensor.dtype} {shape}".encode())
            digest.update(_sample(tensor).to(torch.float32).numpy().tobytes())
        tokenizer = self._directory / "tokenizer.json"
        digest.update(tokenizer.read_bytes() if tokenizer.exists() else b"")
        return digest.hexdigest()

    def _read_part(self, name: str, index: list[int | range]) -> Tensor:
        tensor = self._tensor(name)
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name} is {tensor.dtype}; only floating-point weights are supported")
        return tensor[tuple(slice(each.start, each.stop) if isinstance(each, range) else each for each in index)]

    def _tensor(self, name: str) -> Tensor:
        """A view of the file: what is not used of it is not read."""
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"cannot read {name}: {error}") from error
        return tensor


def _sample(tensor: Tensor) -> Tensor:
    """A few runs of elements, evenly spread."""
    flat = tensor.flatten()
    step = max(1, len(flat) // _SAMPLED_RUNS)
    return flat[: len(flat) // step * step].view(-1, step)[:, :_RUN_ELEMENTS]


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
