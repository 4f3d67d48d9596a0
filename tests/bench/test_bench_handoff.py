"""The hand-off benchmark runs, and its table says what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diptych.bench import handoff_bench
from diptych.bench.handoff_bench import EQUAL, Case


def test_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [*EQUAL, "TP 4 -> 1, scattered"]
    monkeypatch.setattr(handoff_bench, "CASES", (*(Case(1, shape, 2) for shape in shapes), Case(16, EQUAL[0], 2)))
    handoff_bench.main(["--out", str(tmp_path), "--max-mib", "1"])
    report = json.loads((tmp_path / "handoff.json").read_text())
    assert [(row["mib"], row["shape"], row["rounds"]) for row in report["rows"]] == [(1, shape, 2) for shape in shapes]
    for row in report["rows"]:
        assert set(row["seconds"]) == {"memcpy", "shm", "tcp", "raw in place", "raw reused", "digest"}
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert row["shm_of_memcpy"] == pytest.approx(row["gb_per_second"]["shm"] / row["gb_per_second"]["memcpy"])
    first, _, last = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines_of(tmp_path / "handoff.md"))
    assert (first[1], first[10:12]) == (EQUAL[0], ["", ""])
    shares = [last_rate(report, way, shapes[2]) / last_rate(report, way, EQUAL[1]) for way in ("shm", "tcp")]
    assert [cell.split(", ")[1] for cell in last[10:12]] == [f"{share:.2f}" for share in shares]


def lines_of(report: Path) -> list[str]:
    return [line for line in report.read_text().splitlines() if line.startswith("| 1 MiB |")]


def last_rate(report: Any, way: str, shape: str) -> float:
    [row] = [row for row in report["rows"] if row["shape"] == shape]
    return float(row["gb_per_second"][way])


@pytest.mark.parametrize("case", handoff_bench.CASES, ids=str)
def test_cases_are_as_large_as_they_say(case: Case) -> None:
    shape = case.layouts
    for layout in (shape.source, shape.target):
        table = case.table(layout, 1)
        assert len(table) * layout.block_bytes * layout.num_layers * layout.world_size == case.mib << 20
        assert sorted(table) == list(range(len(table)))
        assert shape.scattered or table == sorted(table)
    page_kib = int(case.shape.split()[0]) if case.shape in EQUAL else 64
    assert case.shape not in EQUAL or shape.source.block_bytes == page_kib * 1024
