"""docs/faults.md is what the marks say, and no row is forgotten."""

from __future__ import annotations

from fault_table import TESTS, read_marks, read_rows, render


def test_every_row_is_covered_or_owed_with_a_reason() -> None:
    rows, marks = read_rows(), read_marks()
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    forgotten = [row.number for row in rows if row.number not in marks and not row.owed]
    assert not forgotten
    assert set(marks) <= {row.number for row in rows}


def test_the_page_is_current() -> None:
    page = (TESTS.parent / "docs" / "faults.md").read_text(encoding="utf-8")
    assert page == render(), "make docs"
