"""The `diptych` command, and the composition root: here concrete engines and transports are chosen and
handed in. Heavy imports happen inside the functions that need them, so that `--help` is quick."""

from __future__ import annotations

import logging
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from diptych import __version__
from diptych.core.errors import ConfigError, DiptychError, in_words
from diptych.core.fleet import Role
from diptych.core.settings import CutSettings
from diptych.cut_flags import takes_cuts
from diptych.flag_groups import takes_groups
from diptych.flags import Advertise, HttpFlags, ListenFlags, PoolFlags, Tls, WorkerFlags
from diptych.telemetry.logs import set_up_logging

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


Config = Annotated[Path | None, Option(callback=read_config, is_eager=True, help="TOML file of flags.")]


@app.command()
@takes_cuts(*Role)
@takes_groups
def serve(  # noqa: PLR0913 - one parameter per flag, or group of flags, is what a command line is
    worker: WorkerFlags,
    pools: PoolFlags,
    http: HttpFlags,
    others: ListenFlags,
    grace_seconds: Annotated[float, Option(min=0, help="For running requests, after SIGTERM.")] = 30.0,
    journal: Annotated[Path | None, Option(help="Directory for a record of every decision (JSONL).")] = None,
    config: Config = None,
    *,
    cuts: dict[str, CutSettings],
) -> None:
    """Serve a model through a prefill and a decode pool, with an OpenAI-compatible API."""
    from diptych import serve as composition

    set_up_logging(logging.WARNING)
    settings = composition.ServeSettings(
        pools=composition.PoolSettings(
            **pools.numbers(), cuts={Role(role): cut for role, cut in cuts.items()}, transport=pools.transport
        ),
        engine=worker.engine_settings(),
        cache=worker.cache_settings(),
        batch=worker.batch_settings(),
        http=http.settings(),
        join=others.join_point(),
        grace_seconds=grace_seconds,
        journal=journal,
    )
    composition.run(settings)


@app.command("worker")
@takes_cuts("")
@takes_groups
def join_as_worker(  # noqa: PLR0913 - one parameter per flag is what a command line is
    role: Annotated[Role, Option(help="What it is for.")],
    join: Annotated[str, Option(help="HOST:PORT of the server's --listen.")],
    key_file: Annotated[Path, Option(help="The server's key file, copied here.")],
    worker: WorkerFlags,
    id: Annotated[str | None, Option(help="Its name in the fleet. Default: role and host name.")] = None,
    tls: Tls = False,
    advertise: Advertise = None,
    grace_seconds: Annotated[float, Option(min=0, help="For running requests, once it is told to leave.")] = 30.0,
    rejoin_seconds: Annotated[float, Option(min=0, help="How long a server may be gone.")] = 300.0,
    journal: Annotated[Path | None, Option(help="File for a record of every decision (JSONL).")] = None,
    config: Config = None,
    *,
    cuts: dict[str, CutSettings],
) -> None:
    """Add one worker to a server that runs on another machine (diptych serve --listen)."""
    from diptych import join as composition
    from diptych.worker.joining import Patience

    set_up_logging(logging.INFO)
    settings = composition.JoinSettings(
        role=role,
        router=join,
        key_file=key_file,
        tls=tls,
        worker_id=id,
        advertise=advertise,
        engine=cuts[""].of(worker.engine_settings()),
        cache=worker.cache_settings(),
        batch=worker.batch_settings(),
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

    set_up_logging(logging.INFO)
    run(msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerSettings))


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)
