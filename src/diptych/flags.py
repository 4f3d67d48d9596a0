"""The flags of `diptych serve` and `diptych worker`, by what they are about (see `flag_groups`).

Heavy imports happen inside the methods that need them, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from diptych.core.errors import ConfigError
from diptych.core.settings import BatchSettings, CacheSettings, EngineSettings

if TYPE_CHECKING:
    from diptych.serve import HttpSettings, JoinPoint

Tls = Annotated[bool, Option("--tls", help="Encrypt channels between hosts.")]
Advertise = Annotated[str | None, Option(help="This machine's address, as the others' workers reach it.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFlags:
    """What a worker serves, and with how much."""

    model: Annotated[str | None, Argument(help="Checkpoint directory or hub id. Default: the built-in model.")] = None
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Option(help="What workers compute in.")] = "auto"
    device: Annotated[Literal["cpu", "cuda"], Option(help="Where workers compute.")] = "cpu"
    max_model_len: Annotated[int | None, Option(min=1, help="Longest prompt plus answer, in tokens.")] = None
    kv_cache_tokens: Annotated[int | None, Option(min=1, help="KV cache of each worker, in tokens.")] = None
    block_size: Annotated[int, Option(min=1, help="Tokens per KV block.")] = 16
    eviction: Annotated[Literal["lru", "fifo"], Option(help="Which cached block goes first.")] = "lru"
    prefix_caching: Annotated[bool, Option(help="Reuse the KV of shared prefixes.")] = True
    max_batch_tokens: Annotated[
        int, Option(min=2, help="Tokens per step (and data-parallel rank); longer prompts go in chunks.")
    ] = 512
    max_sequences: Annotated[int, Option(min=1, help="Sequences per step (and data-parallel rank).")] = 64
    engine: Annotated[Literal["torch", "scripted"], Option(help="scripted: no model, made-up tokens.")] = "torch"

    def engine_settings(self) -> EngineSettings:
        """Raises CheckpointError if there is no such model."""
        from diptych.serve import engine_settings

        return engine_settings(
            self.model,
            kind=self.engine,
            device=self.device,
            dtype=self.dtype,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
        )

    def cache_settings(self) -> CacheSettings:
        return CacheSettings(kv_tokens=self.kv_cache_tokens, eviction=self.eviction, prefix_caching=self.prefix_caching)

    def batch_settings(self) -> BatchSettings:
        return BatchSettings(max_batch_tokens=self.max_batch_tokens, max_sequences=self.max_sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFlags:
    """How many workers there are of each role."""

    prefill: Annotated[int | None, Option(min=0, help="Workers that read prompts. Default 1; 0 with --mixed.")] = None
    decode: Annotated[int | None, Option(min=0, help="Workers that write answers. Default 1; 0 with --mixed.")] = None
    mixed: Annotated[int, Option(min=0, help="Workers that do both, un-split.")] = 0
    transport: Annotated[
        Literal["auto", "shm", "tcp", "nixl", "fastest"],
        Option(help="How KV pages travel. fastest: by nixl or tcp, as each link finds out."),
    ] = "auto"

    def numbers(self) -> dict[str, int]:
        """Of workers, by role."""
        split = 0 if self.mixed else 1
        return {
            "prefill": split if self.prefill is None else self.prefill,
            "decode": split if self.decode is None else self.decode,
            "mixed": self.mixed,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpFlags:
    """Clients: where they come in, who they are, and what they may have."""

    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000
    max_requests: Annotated[int, Option(min=1, help="Streams served or queued at once; beyond that 429.")] = 1024
    max_queue_seconds: Annotated[
        float, Option(min=0.001, help="Requests that would wait longer for their turn get 429.")
    ] = 60.0
    max_connections: Annotated[int, Option(min=1, help="Connections of clients at once; beyond that 503.")] = 8192
    checkpoint_tokens: Annotated[
        int, Option(min=0, help="Copy each stream's KV to another worker every so many tokens; 0: never.")
    ] = 0
    race_prefill: Annotated[int, Option(min=1, max=4, help="Workers that prefill each prompt; the first wins.")] = 1
    served_model_name: Annotated[list[str] | None, Option(help="Name(s) of the model for clients.")] = None
    api_key: Annotated[list[str] | None, Option(envvar="DIPTYCH_API_KEY", help="Key(s) clients must send.")] = None
    tenants: Annotated[Path | None, Option(help="TOML file of tenants: keys, weights and limits.")] = None

    def settings(self) -> HttpSettings:
        """Raises ConfigError for a file of tenants that cannot be read."""
        from diptych.front.tenants import Tenants, read_tenants
        from diptych.serve import HttpSettings

        return HttpSettings(
            host=self.host,
            port=self.port,
            api_keys=tuple(self.api_key or ()),
            served_model_names=tuple(self.served_model_name or ()),
            max_requests=self.max_requests,
            max_queue_seconds=self.max_queue_seconds,
            max_connections=self.max_connections,
            checkpoint_tokens=self.checkpoint_tokens,
            race_prefill=self.race_prefill,
            tenants=Tenants() if self.tenants is None else read_tenants(self.tenants),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenFlags:
    """Workers from elsewhere."""

    listen: Annotated[str | None, Option(help="HOST:PORT where workers of other machines may join.")] = None
    key_file: Annotated[Path | None, Option(help="Secret that they share with this server; made if missing.")] = None
    tls: Tls = False
    advertise: Advertise = None

    def join_point(self) -> JoinPoint | None:
        """Raises ConfigError if nobody could prove that he may join."""
        from diptych.serve import JoinPoint

        if self.listen is None:
            return None
        if self.key_file is None:
            raise ConfigError("--listen needs --key-file: only who holds the same key may join")
        return JoinPoint(address=self.listen, key_file=self.key_file, tls=self.tls, advertise=self.advertise)
