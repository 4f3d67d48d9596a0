"""What `diptych serve` says to flags that make no sense, before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diptych.cli import app, main

SERVE = ("serve", "--engine", "scripted")


def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line with which the command ends."""
    monkeypatch.setattr(sys, "argv", ["diptych", *SERVE, *flags])
    with pytest.raises(SystemExit) as end:
        main()
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert line.startswith("diptych: ")
    return line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--prefill", "0", "--decode", "0"), ("--prefill", "--decode", "--mixed")),
        (("--max-batch-tokens", "32"), ("--max-batch-tokens", "--max-sequences")),
        (("--listen", "127.0.0.1:0"), ("--listen", "--key-file")),
    ],
    ids=" ".join,
)
def test_flags_that_do_not_go_together(
    flags: tuple[str, ...], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(monkeypatch, capsys, *flags, "--port", "0")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "http"),
        ("--port", "70000"),
        ("--block-size", "0"),
        ("--transport", "pigeon"),
        ("--engine", "steam"),
        ("--dtype", "float13"),
        ("--eviction", "random"),
        ("--race-prefill", "5"),
        ("--speed", "9"),
    ],
)
def test_a_flag_that_is_not_taken(flag: str, value: str) -> None:
    result = CliRunner().invoke(app, ["serve", flag, value])
    assert result.exit_code == 2
    assert flag in result.output


@pytest.mark.parametrize(
    ("text", "words"),
    [("speed = 9\n", ("'speed'", "prefill")), ("port = \n", ("line 1",)), (None, ("No such file",))],
    ids=["unknown key", "not TOML", "missing"],
)
def test_config_file_that_is_wrong(
    tmp_path: Path,
    text: str | None,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "diptych.toml"
    if text is not None:
        config.write_text(text)
    line = complaint(monkeypatch, capsys, "--config", str(config))
    assert all(word in line for word in ("diptych: --config", str(config), *words)), line
