"""The hand-off benchmark runs, and its table says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych.bench import handoff_bench
from diptych.bench.handoff_bench import Case


def test_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff_bench, "CASES", (Case(1, 64, True, 2), Case(16, 64, False, 2)))
    handoff_bench.main(["--out", str(tmp_path), "--max-mib", "1"])
    report = json.loads((tmp_path / "handoff.json").read_text())
    (row,) = report["rows"]
    assert (row["mib"], row["scattered"], row["rounds"]) == (1, True, 2)
    assert set(row["seconds"]) == {"memcpy", "shm", "tcp", "raw in place", "raw reused", "digest"}
    assert all(seconds > 0 for seconds in row["seconds"].values())
    assert row["shm_of_memcpy"] == pytest.approx(row["gb_per_second"]["shm"] / row["gb_per_second"]["memcpy"])
    assert "| 1 MiB | 64 KiB scattered | 2 |" in (tmp_path / "handoff.md").read_text()


@pytest.mark.parametrize("case", handoff_bench.CASES, ids=str)
def test_cases_are_as_large_as_they_say(case: Case) -> None:
    layout = case.layout
    assert layout.block_bytes == case.page_kib * 1024
    assert case.num_blocks * layout.block_bytes * layout.num_layers == case.mib << 20
    assert sorted(case.table(1)) == list(range(case.num_blocks))
