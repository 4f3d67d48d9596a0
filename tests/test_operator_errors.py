"""What an operator reads when flags or files are wrong: one line that says what to change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diptych import cli

SERVE = ("serve", "--engine", "scripted")


def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command ends."""
    monkeypatch.setattr(sys, "argv", ["diptych", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("diptych: ")


@pytest.mark.parametrize("flag", ["--tenants", "--config"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        (b"\xff\xfe", "it is no UTF-8 text"),
        (b"x = [", "Invalid value (at end of document)"),
    ],
    ids=["missing", "binary", "cut off"],
)
def test_a_file_that_cannot_be_read(
    flag: str,
    content: bytes | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "file.toml"
    if content is not None:
        path.write_bytes(content)
    line = complaint(monkeypatch, capsys, *SERVE, flag, str(path))
    assert line == f"{flag} {path}: {words}"


def test_a_directory_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(monkeypatch, capsys, *SERVE, "--tenants", str(tmp_path))
    assert line == f"--tenants {tmp_path}: Is a directory"
    line = complaint(monkeypatch, capsys, "check", "layers=2,dtype=uint8,heads=1,dim=8", f"{tmp_path}/no.json")
    assert line == f"{tmp_path}/no.json: No such file or directory"


@pytest.mark.parametrize(
    ("text", "words"),
    [("speed = 9\n", ("'speed'", "prefill")), ("port = \n", ("line 1",))],
    ids=["unknown key", "no TOML"],
)
def test_a_config_file_that_is_wrong(
    text: str,
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "diptych.toml"
    config.write_text(text)
    line = complaint(monkeypatch, capsys, *SERVE, "--config", str(config))
    assert all(word in line for word in ("--config", str(config), *words)), line


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
    line = complaint(monkeypatch, capsys, *SERVE, *flags, "--port", "0")
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
    result = CliRunner().invoke(cli.app, ["serve", flag, value])
    assert result.exit_code == 2
    assert flag in result.output
