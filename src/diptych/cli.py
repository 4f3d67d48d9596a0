"""The `diptych` command, and the composition root: here concrete engines and transports are chosen and
handed in. Heavy imports happen inside the functions that need them, so that `--help` is quick."""

from __future__ import annotations

import logging
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from diptych import __version__
from diptych.core.errors import ConfigError, DiptychError, in_words
from diptych.core.fleet import Role
from diptych.core.settings import BatchSettings, CacheSettings, CutSettings
from diptych.cut_flags import takes_cuts

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command line; a deliberate error ends it with one line that says what to do."""
    try:
        app()
    except DiptychError as error:
        print(f"diptych: {error.message}", file=sys.stderr)
        sys.exit(1)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take a TOML file's keys as defaults: the flags' names, with `-` or `_`. Flags win."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path}: {in_words(error)}") from error
    known = {parameter.name for parameter in context.command.params} - {"config"}
    defaults: dict[str, Any] = {key.replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(defaults) - known)
    if unknown:
        raise ConfigError(f"--config {path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


# flags that `serve` and `worker` share

Model = Annotated[str | None, Argument(help="Checkpoint directory or hub id. Default: the built-in model.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16"], Option(help="What workers compute in.")]
Device = Annotated[Literal["cpu", "cuda"], Option(help="Where workers compute.")]
MaxModelLen = Annotated[int | None, Option(min=1, help="Longest prompt plus answer, in tokens.")]
KVCacheTokens = Annotated[int | None, Option(min=1, help="KV cache of each worker, in tokens.")]
BlockSize = Annotated[int, Option(min=1, help="Tokens per KV block.")]
EvictionOrder = Annotated[Literal["lru", "fifo"], Option(help="Which cached block goes first.")]
PrefixCaching = Annotated[bool, Option(help="Reuse the KV of shared prefixes.")]
MaxBatchTokens = Annotated[
    int, Option(min=2, help="Tokens per step (and data-parallel rank); longer prompts go in chunks.")
]
MaxSequences = Annotated[int, Option(min=1, help="Sequences per step (and data-parallel rank).")]
EngineKind = Annotated[Literal["torch", "scripted"], Option(help="scripted: no model, made-up tokens.")]
Transport = Annotated[
    Literal["auto", "shm", "tcp", "nixl", "fastest"],
    Option(help="How KV pages travel. fastest: by nixl or tcp, as each link finds out."),
]
Tls = Annotated[bool, Option("--tls", help="Encrypt channels between hosts.")]
Advertise = Annotated[str | None, Option(help="This machine's address, as the others' workers reach it.")]
Config = Annotated[Path | None, Option(callback=read_config, is_eager=True, help="TOML file of flags.")]


@app.command()
@takes_cuts(*Role)
def serve(  # noqa: PLR0913 - one parameter per flag is what a command line is
    model: Model = None,
    prefill: Annotated[int | None, Option(min=0, help="Workers that read prompts. Default 1; 0 with --mixed.")] = None,
    decode: Annotated[int | None, Option(min=0, help="Workers that write answers. Default 1; 0 with --mixed.")] = None,
    mixed: Annotated[int, Option(min=0, help="Workers that do both, un-split.")] = 0,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    transport: Transport = "auto",
    max_model_len: MaxModelLen = None,
    kv_cache_tokens: KVCacheTokens = None,
    block_size: BlockSize = 16,
    eviction: EvictionOrder = "lru",
    prefix_caching: PrefixCaching = True,
    max_batch_tokens: MaxBatchTokens = 512,
    max_sequences: MaxSequences = 64,
    max_requests: Annotated[int, Option(min=1, help="Streams served or queued at once; beyond that 429.")] = 1024,
    max_queue_seconds: Annotated[
        float, Option(min=0.001, help="Requests that would wait longer for their turn get 429.")
    ] = 60.0,
    max_connections: Annotated[int, Option(min=1, help="Connections of clients at once; beyond that 503.")] = 8192,
    checkpoint_tokens: Annotated[
        int, Option(min=0, help="Copy each stream's KV to another worker every so many tokens; 0: never.")
    ] = 0,
    race_prefill: Annotated[int, Option(min=1, max=4, help="Workers that prefill each prompt; the first wins.")] = 1,
    served_model_name: Annotated[list[str] | None, Option(help="Name(s) of the model for clients.")] = None,
    api_key: Annotated[list[str] | None, Option(envvar="DIPTYCH_API_KEY", help="Key(s) clients must send.")] = None,
    tenants: Annotated[Path | None, Option(help="TOML file of tenants: keys, weights and limits.")] = None,
    engine: EngineKind = "torch",
    listen: Annotated[str | None, Option(help="HOST:PORT where workers of other machines may join.")] = None,
    key_file: Annotated[Path | None, Option(help="Secret that they share with this server; made if missing.")] = None,
    tls: Tls = False,
    advertise: Advertise = None,
    grace_seconds: Annotated[float, Option(min=0, help="For running requests, after SIGTERM.")] = 30.0,
    journal: Annotated[Path | None, Option(help="Directory for a record of every decision (JSONL).")] = None,
    config: Config = None,
    *,
    cuts: dict[str, CutSettings],
) -> None:
    """Serve a model through a prefill and a decode pool, with an OpenAI-compatible API."""
    from diptych import serve as composition
    from diptych.front.tenants import Tenants, read_tenants

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if listen is not None and key_file is None:
        raise ConfigError("--listen needs --key-file: only who holds the same key may join")
    split = 0 if mixed else 1
    settings = composition.ServeSettings(
        pools=composition.PoolSettings(
            prefill=split if prefill is None else prefill,
            decode=split if decode is None else decode,
            mixed=mixed,
            cuts={Role(role): cut for role, cut in cuts.items()},
            transport=transport,
        ),
        engine=composition.engine_settings(
            model, kind=engine, device=device, dtype=dtype, block_size=block_size, max_model_len=max_model_len
        ),
        cache=CacheSettings(kv_tokens=kv_cache_tokens, eviction=eviction, prefix_caching=prefix_caching),
        batch=BatchSettings(max_batch_tokens=max_batch_tokens, max_sequences=max_sequences),
        http=composition.HttpSettings(
            host=host,
            port=port,
            api_keys=tuple(api_key or ()),
            served_model_names=tuple(served_model_name or ()),
            max_requests=max_requests,
            max_queue_seconds=max_queue_seconds,
            max_connections=max_connections,
            checkpoint_tokens=checkpoint_tokens,
            race_prefill=race_prefill,
            tenants=Tenants() if tenants is None else read_tenants(tenants),
        ),
        join=None
        if listen is None or key_file is None
        else composition.JoinPoint(address=listen, key_file=key_file, tls=tls, advertise=advertise),
        grace_seconds=grace_seconds,
        journal=journal,
    )
    composition.run(settings)


@app.command()
@takes_cuts("")
def worker(  # noqa: PLR0913 - one parameter per flag is what a command line is
    role: Annotated[Role, Option(help="What it is for.")],
    join: Annotated[str, Option(help="HOST:PORT of the server's --listen.")],
    key_file: Annotated[Path, Option(help="The server's key file, copied here.")],
    model: Model = None,
    id: Annotated[str | None, Option(help="Its name in the fleet. Default: role and host name.")] = None,
    tls: Tls = False,
    advertise: Advertise = None,
    grace_seconds: Annotated[float, Option(min=0, help="For running requests, once it is told to leave.")] = 30.0,
    rejoin_seconds: Annotated[float, Option(min=0, help="How long a server may be gone.")] = 300.0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    max_model_len: MaxModelLen = None,
    kv_cache_tokens: KVCacheTokens = None,
    block_size: BlockSize = 16,
    eviction: EvictionOrder = "lru",
    prefix_caching: PrefixCaching = True,
    max_batch_tokens: MaxBatchTokens = 512,
    max_sequences: MaxSequences = 64,
    engine: EngineKind = "torch",
    journal: Annotated[Path | None, Option(help="File for a record of every decision (JSONL).")] = None,
    config: Config = None,
    *,
    cuts: dict[str, CutSettings],
) -> None:
    """Add one worker to a server that runs on another machine (diptych serve --listen)."""
    from diptych import join as composition
    from diptych.serve import engine_settings
    from diptych.worker.joining import Patience

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = composition.JoinSettings(
        role=role,
        router=join,
        key_file=key_file,
        tls=tls,
        worker_id=id,
        advertise=advertise,
        engine=cuts[""].of(
            engine_settings(
                model, kind=engine, device=device, dtype=dtype, block_size=block_size, max_model_len=max_model_len
            )
        ),
        cache=CacheSettings(kv_tokens=kv_cache_tokens, eviction=eviction, prefix_caching=prefix_caching),
        batch=BatchSettings(max_batch_tokens=max_batch_tokens, max_sequences=max_sequences),
        patience=Patience(grace=grace_seconds, rejoin=rejoin_seconds),
        journal=journal,
    )
    composition.run(settings)


@app.command()
def check(
    source: Annotated[str, Argument(metavar="A", help="JSON or TOML file of a manifest or layout, or tp=4,block=16.")],
    target: Annotated[str, Argument(metavar="B", help="As A; KV passes from A to B.")],
    model: Annotated[Path | None, Option(help="Model directory, for what A and B leave open.")] = None,
    tokens: Annotated[int, Option(min=1, help="Length of the prompt to plan for.")] = 8192,
) -> None:
    """Say on paper whether KV can pass between two workers, and in how many pieces. Exit status 1: it cannot."""
    from diptych import check as paper

    ours, theirs = paper.read_side(source, model), paper.read_side(target, model)
    for line in paper.report(ours, theirs, tokens):
        print(line)
    if paper.mismatches(ours, theirs):
        raise typer.Exit(1)


@app.command(hidden=True)
def worker_process() -> None:
    """One worker, as `serve` starts it: settings come as JSON on standard input."""
    import msgspec

    from diptych.core.settings import WorkerSettings
    from diptych.worker_process import run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run(msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerSettings))


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)
