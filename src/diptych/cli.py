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
from diptych.core.errors import ConfigError, DiptychError
from diptych.core.settings import BatchSettings, CacheSettings

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
        values = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    known = {parameter.name for parameter in context.command.params} - {"config"}
    defaults: dict[str, Any] = {key.replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(defaults) - known)
    if unknown:
        raise ConfigError(f"--config {path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


@app.command()
def serve(  # noqa: PLR0913 - one parameter per flag is what a command line is
    model: Annotated[str | None, Argument(help="Checkpoint directory or hub id. Default: the built-in model.")] = None,
    prefill: Annotated[int | None, Option(min=0, help="Workers that read prompts. Default 1; 0 with --mixed.")] = None,
    decode: Annotated[int | None, Option(min=0, help="Workers that write answers. Default 1; 0 with --mixed.")] = None,
    mixed: Annotated[int, Option(min=0, help="Workers that do both, un-split.")] = 0,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Option(help="What workers compute in.")] = "auto",
    device: Annotated[Literal["cpu", "cuda"], Option(help="Where workers compute.")] = "cpu",
    transport: Annotated[Literal["auto", "shm", "tcp"], Option(help="How KV pages travel.")] = "auto",
    max_model_len: Annotated[int | None, Option(min=1, help="Longest prompt plus answer, in tokens.")] = None,
    kv_cache_tokens: Annotated[int | None, Option(min=1, help="KV cache of each worker, in tokens.")] = None,
    block_size: Annotated[int, Option(min=1, help="Tokens per KV block.")] = 16,
    eviction: Annotated[Literal["lru", "fifo"], Option(help="Which cached block goes first.")] = "lru",
    prefix_caching: Annotated[bool, Option(help="Reuse the KV of shared prefixes.")] = True,
    max_batch_tokens: Annotated[int, Option(min=2, help="Tokens per step; longer prompts go in chunks.")] = 512,
    max_sequences: Annotated[int, Option(min=1, help="Sequences per step and worker.")] = 64,
    max_requests: Annotated[int, Option(min=1, help="Streams served or queued at once; beyond that 429.")] = 1024,
    served_model_name: Annotated[list[str] | None, Option(help="Name(s) of the model for clients.")] = None,
    api_key: Annotated[list[str] | None, Option(envvar="DIPTYCH_API_KEY", help="Key(s) clients must send.")] = None,
    engine: Annotated[Literal["torch", "scripted"], Option(help="scripted: no model, made-up tokens.")] = "torch",
    journal: Annotated[Path | None, Option(help="Directory for a record of every decision (JSONL).")] = None,
    config: Annotated[Path | None, Option(callback=read_config, is_eager=True, help="TOML file of flags.")] = None,
) -> None:
    """Serve a model through a prefill and a decode pool, with an OpenAI-compatible API."""
    from diptych import serve as composition

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    split = 0 if mixed else 1
    settings = composition.ServeSettings(
        pools=composition.PoolSettings(
            prefill=split if prefill is None else prefill,
            decode=split if decode is None else decode,
            mixed=mixed,
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
        ),
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
