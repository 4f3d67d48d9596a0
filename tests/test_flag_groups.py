"""Flags that come in groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer import Argument, Option
from typer.testing import CliRunner

from diptych.flag_groups import takes_groups
from diptych.flags import HttpFlags, ListenFlags, PoolFlags, WorkerFlags


@dataclass(frozen=True)
class Size:
    """Two flags, of which one must be given."""

    wide: Annotated[int, Option(min=1)]
    high: Annotated[int, Option("--high", "-h")] = 3


@dataclass(frozen=True)
class Where:
    place: Annotated[str, Argument()] = "here"


def taken(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and what the command was handed in."""
    found: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @takes_groups
    def run(size: Size, where: Where, often: int = 1) -> None:
        found.update(size=size, where=where, often=often)

    return CliRunner().invoke(app, arguments).exit_code, found


def test_a_group_is_handed_in_as_one() -> None:
    assert taken("--wide", "2") == (0, {"size": Size(2), "where": Where(), "often": 1})
    given = taken("there", "-h", "9", "--wide", "2", "--often", "5")
    assert given == (0, {"size": Size(2, 9), "where": Where("there"), "often": 5})


@pytest.mark.parametrize("wrong", [(), ("--wide", "0"), ("--wide", "2", "--size", "1")])
def test_flags_in_groups_are_checked_like_others(wrong: tuple[str, ...]) -> None:
    assert taken(*wrong) == (2, {})


def test_defaults_of_flags_are_those_of_the_settings() -> None:
    """They stand in both places: settings are made without a command line, too."""
    from diptych.core.settings import BatchSettings, CacheSettings
    from diptych.serve import HttpSettings, PoolSettings

    worker, pools = WorkerFlags(), PoolFlags()
    assert worker.cache_settings() == CacheSettings()
    assert worker.batch_settings() == BatchSettings()
    assert HttpFlags().settings() == HttpSettings()
    assert PoolSettings(**pools.numbers(), transport=pools.transport) == PoolSettings()
    assert PoolFlags(mixed=2).numbers() == {"prefill": 0, "decode": 0, "mixed": 2}
    assert ListenFlags().join_point() is None
