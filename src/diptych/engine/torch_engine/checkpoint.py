"""A checkpoint as it is going to be served: where it lies, its config, and the operator's choices. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diptych.core.errors import CheckpointError, ConfigError
from diptych.core.fleet import ModelInfo
from diptych.core.kv_layout import KVLayout
from diptych.core.settings import ParallelSettings
from diptych.engine.hub import resolve_checkpoint
from diptych.engine.torch_engine.config import ModelConfig, load_config

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model directory, and how it is served: `dtype` is one of DTYPES, `max_len` in tokens."""

    directory: Path
    name: str
    config: ModelConfig
    dtype: str
    max_len: int

    def layout(self, block_size: int, parallel: ParallelSettings) -> KVLayout:
        """The KV layout of a worker that serves it. Raises ConfigError for a cut that does not come out even."""
        try:
            return KVLayout(
                num_layers=self.config.num_layers,
                num_kv_heads=self.config.num_kv_heads,
                head_dim=self.config.head_dim,
                dtype=self.dtype,
                block_size=block_size,
                tensor_parallel=parallel.tensor,
                pipeline_parallel=parallel.pipeline,
                data_parallel=parallel.data,
                expert_parallel=parallel.expert,
            )
        except ValueError as error:
            raise ConfigError(f"{self.name} cannot be cut so: {error}") from error

    def model_info(self, digest: str) -> ModelInfo:
        """What the worker says of it, with the digest of its content (`weight_files`)."""
        return ModelInfo(
            name=self.name,
            digest=digest,
            vocab_size=self.config.vocab_size,
            max_model_len=self.max_len,
            eos_token_ids=self.config.eos_token_ids,
        )


def open_checkpoint(path: str | Path, dtype: str = "auto", max_model_len: int | None = None) -> Checkpoint:
    """Find a checkpoint (see `hub`) and read its config. Raises CheckpointError or ConfigError.

    `dtype` is one of DTYPES or "auto" (the checkpoint's own; bfloat16 for a float16 one)."""
    directory = resolve_checkpoint(path)
    config = load_config(directory)
    return Checkpoint(
        directory=directory,
        name=Path(path).name if Path(path).expanduser().is_dir() else str(path),
        config=config,
        dtype=_served_dtype(config, dtype),
        max_len=_served_len(config, max_model_len),
    )


def _served_len(config: ModelConfig, wanted: int | None) -> int:
    served = config.max_len if wanted is None else wanted
    if not 1 <= served <= config.max_len:
        raise ConfigError(f"max_model_len is {wanted}; this model takes 1 to {config.max_len} tokens")
    if config.sliding_window is not None and config.sliding_window < served:
        raise CheckpointError(
            f"config.json: sliding_window is {config.sliding_window}, shorter than the {served} tokens served; sliding "
            f"windows are not supported, so set max_model_len to at most {config.sliding_window}"
        )
    return served


def _served_dtype(config: ModelConfig, wanted: str) -> str:
    if wanted == "auto":
        wanted = "bfloat16" if config.dtype == "float16" else config.dtype
    if wanted not in DTYPES:
        raise ConfigError(f"dtype is {wanted!r}; supported are auto, {', '.join(DTYPES)}")
    return wanted
