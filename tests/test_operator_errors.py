"""What an operator reads when flags or files are wrong: one line that says what to change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diptych import cli


def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
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
    line = complaint(monkeypatch, capsys, "serve", "--engine", "scripted", flag, str(path))
    assert line == f"{flag} {path}: {words}"


def test_a_directory_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(monkeypatch, capsys, "serve", "--engine", "scripted", "--tenants", str(tmp_path))
    assert line == f"--tenants {tmp_path}: Is a directory"
    line = complaint(monkeypatch, capsys, "check", "layers=2,dtype=uint8,heads=1,dim=8", f"{tmp_path}/no.json")
    assert line == f"{tmp_path}/no.json: No such file or directory"
