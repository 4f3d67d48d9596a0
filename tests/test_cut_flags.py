"""The flags that cut workers into ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from diptych.cli import app
from diptych.core.errors import ConfigError
from diptych.core.settings import CutSettings, EngineSettings, ParallelSettings
from diptych.cut_flags import takes_cuts


def cuts_of(*arguments: str) -> dict[str, CutSettings]:
    """What a command with flags for two roles, and its own, is handed in."""
    taken: dict[str, CutSettings] = {}
    command = typer.Typer()

    @command.command()
    @takes_cuts("prefill", "decode", "")
    def run(name: str = "", *, cuts: dict) -> None:
        taken.update(cuts)

    result = CliRunner().invoke(command, arguments)
    if result.exception is not None:
        raise result.exception
    return taken


def test_each_role_has_its_cut() -> None:
    cuts = cuts_of(
        "--prefill-tp", "4", "--prefill-ep", "4", "--decode-dp", "2", "--decode-block-size", "32", "--pp", "3"
    )
    assert cuts == {
        "prefill": CutSettings(parallel=ParallelSettings(tensor=4, expert=4)),
        "decode": CutSettings(parallel=ParallelSettings(data=2), block_size=32),
        "": CutSettings(parallel=ParallelSettings(pipeline=3)),
    }


def test_without_flags_there_is_one_rank() -> None:
    assert set(cuts_of().values()) == {CutSettings()}
    engine = EngineSettings(block_size=8)
    assert CutSettings().of(engine) == engine
    assert CutSettings(block_size=4).of(engine) == EngineSettings(block_size=4)


@pytest.mark.parametrize("command", [["serve"], ["worker", "--role", "decode", "--join", "h:1", "--key-file", "k"]])
def test_a_cut_that_makes_no_sense_is_refused(command: list[str]) -> None:
    flag = "--prefill-ep" if command == ["serve"] else "--ep"
    result = CliRunner().invoke(app, [*command, flag, "3"])
    assert isinstance(result.exception, ConfigError)
    assert "expert parallelism is 1 or data x tensor parallelism (1), not 3" in result.exception.message


def test_a_configuration_file_may_say_it(tmp_path: Path) -> None:
    file = tmp_path / "diptych.toml"
    file.write_text("prefill-tp = 2\ndecode_block_size = 64\n")
    result = CliRunner().invoke(app, ["serve", "--config", str(file), "--prefill-ep", "3"])
    assert isinstance(result.exception, ConfigError)
    assert "(2), not 3" in result.exception.message
