"""One message, one line."""

from __future__ import annotations

import logging

from hypothesis import example, given
from hypothesis import strategies as st

from diptych.telemetry.logs import FORMAT, OneLine


def formatted(name: str) -> str:
    record = logging.LogRecord("diptych", logging.WARNING, __file__, 1, "model %s", (name,), None)
    return OneLine(FORMAT).format(record)


@given(name=st.text())
@example(name="m\n2026-01-01 00:00:00,000 INFO diptych: all is well")
@example(name="\x1b[2J\x9b2J\u2028\u202e\ud800")
def test_no_name_forges_a_line_or_speaks_to_the_terminal(name: str) -> None:
    line = formatted(name)
    assert line.isprintable()
    assert len(line.splitlines()) == 1


def test_what_is_printable_stays() -> None:
    assert formatted("Größe 模型 \\n").endswith("WARNING diptych: model Größe 模型 \\n")


def test_tracebacks_keep_their_lines() -> None:
    try:
        raise ValueError("why")
    except ValueError as error:
        record = logging.LogRecord("diptych", logging.ERROR, __file__, 1, "broke", (), (ValueError, error, None))
    assert OneLine(FORMAT).format(record).splitlines()[1:] == ["ValueError: why"]
