"""The hand-off benchmark runs, and its table says what it measured."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from diptych.bench import handoff_bench, handoff_cases, handoff_ceiling
from diptych.bench.handoff_cases import EQUAL, Case
from diptych.core.kv_layout import KVMemory


def test_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [*EQUAL, "TP 4 -> 1, scattered"]
    monkeypatch.setattr(handoff_bench, "CASES", (*(Case(1, shape, 2) for shape in shapes), Case(16, EQUAL[0], 2)))
    monkeypatch.setattr(handoff_bench, "iperf3", lambda seconds: 1e6)
    handoff_bench.main(["--out", str(tmp_path), "--max-mib", "1"])
    report = json.loads((tmp_path / "handoff.json").read_text())
    assert [(row["mib"], row["shape"], row["rounds"]) for row in report["rows"]] == [(1, shape, 2) for shape in shapes]
    ways = {"memcpy", "page copies", "ceiling", "shm", "tcp", "raw in place", "raw reused", "digest"}
    for row in report["rows"]:
        assert set(row["seconds"]) == ways
        assert set(row["gb_per_second"]) == {*ways, "iperf3"}
        assert all(seconds > 0 for seconds in row["seconds"].values())
        for name in ("memcpy", "page copies", "ceiling"):
            share = row["gb_per_second"]["shm"] / row["gb_per_second"][name]
            assert row[f"shm_of_{name.replace(' ', '_')}"] == pytest.approx(share)
        assert (row["best_raw"], row["tcp_of_raw"]) == ("iperf3", row["gb_per_second"]["tcp"] / 1e6)
    tables = (tmp_path / "handoff.md").read_text().split("\n## ")[1:]
    assert [len(lines_of(part)) for part in tables] == [3, 3, 1]
    for part in tables:
        assert len({line.count("|") for line in part.splitlines() if line[:1] == "|"}) == 1
    [resharded] = lines_of(tables[2])
    rates = [
        last_rate(report, way, shapes[2]) / last_rate(report, way, name) for way in ("shm", "tcp") for name in EQUAL
    ]
    assert resharded == ["1 MiB", shapes[2], *(f"{rate:.2f}" for rate in rates)]


def lines_of(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| 1 MiB |")
    ]


def last_rate(report: Any, way: str, shape: str) -> float:
    [row] = [row for row in report["rows"] if row["shape"] == shape]
    return float(row["gb_per_second"][way])


@pytest.mark.parametrize("shape", handoff_cases.SHAPES)
def test_the_bare_loops_move_the_same_bytes(shape: str) -> None:
    """What is hashed on one side is what is hashed on the other, and it is everything, once."""
    case = Case(1, shape, 1)
    source, target = case.layouts.source, case.layouts.target
    content = random.Random(1).randbytes(1 << 20)
    size = (1 << 20) // source.world_size
    num_blocks = len(case.source.blocks), len(case.target.blocks)
    sources = [
        KVMemory(source, num_blocks[0], memoryview(content)[rank * size : (rank + 1) * size], rank)
        for rank in range(source.world_size)
    ]
    size = (1 << 20) // target.world_size
    targets = [KVMemory(target, num_blocks[1], memoryview(bytearray(size)), rank) for rank in range(target.world_size)]
    frames = handoff_ceiling.bare_frames(case)
    announced: list[int] = []
    handoff_ceiling.copy_all(frames, sources, targets, announce=announced.append)
    assert announced == list(range(len(frames)))
    assert sum(length for frame in frames for unit in frame.units for _, _, length in unit.copies) == 1 << 20
    for frame in frames:
        here, there = sources[frame.source_rank].layer(frame.layer), targets[frame.target_rank].layer(frame.layer)
        for unit in frame.units:
            assert handoff_ceiling._hash(here, unit.at_source) == handoff_ceiling._hash(there, unit.at_target)


@pytest.mark.parametrize("case", handoff_cases.CASES, ids=str)
def test_cases_are_as_large_as_they_say(case: Case) -> None:
    shape = case.layouts
    for side in (case.source, case.target):
        layout, table = side.layout, list(side.blocks)
        assert len(table) * layout.block_bytes * layout.num_layers * layout.world_size == case.mib << 20
        assert sorted(table) == list(range(len(table)))
        assert shape.scattered or table == sorted(table)
    page_kib = int(case.shape.split()[0]) if case.shape in EQUAL else 64
    assert case.shape not in EQUAL or shape.source.block_bytes == page_kib * 1024
