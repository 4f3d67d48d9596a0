"""The overlap benchmark runs with real workers, and its arithmetic says what the workers wrote down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diptych.bench import overlap
from diptych.bench.overlap import Plan
from diptych.bench.overlap_report import bound, cases, markdown, of_case, summarize

MACHINE = {
    **dict.fromkeys(
        ("command", "date", "git_commit", "cpu", "cores", "memory_gib", "platform", "python", "torch"), "-"
    ),
    "load_before": 0.0,
}


def test_real_workers_write_down_what_happened(tmp_path: Path) -> None:
    plan = Plan(engine="scripted", lengths=(32, 600), rounds=1)
    runs = overlap.run(plan, tmp_path)
    assert cases(runs) == [(32, "shm"), (32, "tcp"), (600, "shm"), (600, "tcp")]
    for run in runs:
        assert len(run["chunks"]) == (1 if run["tokens"] == 32 else 2)
        assert len(run["decodes"]) == overlap.DECODE_TOKENS - 1
        for chunk in run["chunks"]:
            assert chunk["begin"] <= chunk["layers"][0] <= chunk["layers"][-1] <= chunk["end"]
            assert all(written < verified for written, verified in zip(chunk["layers"], chunk["verified"], strict=True))
        assert run["chunks"][-1]["verified"][-1] < run["complete"] < run["decodes"][0][0]
        assert run["chunks"][-1]["layers"][-1] < run["computed"] < run["first_token"] < run["complete"]
        assert run["transfer"] > 0
    assert "| 600 | tcp |" in markdown({"machine": MACHINE, "torch": runs, "scripted": runs})


def steps(request: str, *spans: tuple[float, float, int, int]) -> list[dict[str, Any]]:
    return [
        {
            **{"begin": begin, "layers": [begin + 1, begin + 2], "computed": begin + 2.5, "end": end},
            "rows": [[request, first, last]],
        }
        for begin, end, first, last in spans
    ]


def pages(request: str, time: float, layer: int, first_block: int, num_blocks: int) -> dict[str, Any]:
    return {"request": request, "time": time, "layer": layer, "first_block": first_block, "num_blocks": num_blocks}


def test_times_count_from_the_first_step_and_pages_belong_to_the_chunk_that_made_them() -> None:
    source = {
        "steps": [
            *steps("r", (100, 103, 0, 32), (103, 106, 32, 64)),
            *steps("other", (106, 107, 0, 16)),
            *steps("r-cached", (200.5, 203, 48, 64)),
        ],
        "pushed": {"r": 101, "r-cached": 200},
    }
    target = {
        "verified": [
            *(pages("r", 101.5, 0, 0, 1), pages("r", 102.0, 0, 1, 1), pages("r", 103.5, 1, 0, 2)),
            *(pages("r", 105.0, 0, 2, 2), pages("r", 106.5, 1, 2, 2), pages("other", 150, 1, 0, 4)),
            *(pages("r-cached", 201, 0, 0, 3), pages("r-cached", 203, 1, 0, 3), pages("r-cached", 210, 1, 3, 1)),
        ],
        "complete": {"r": 107.0},
        "steps": steps("r", (107.5, 109, 64, 65), (109, 110, 65, 66)),
    }
    run = summarize({"request": "r", "tokens": 64, "transport": "tcp"}, source, target)
    assert [chunk["verified"] for chunk in run["chunks"]] == [[2.0, 3.5], [5.0, 6.5]]
    assert [chunk["layers"] for chunk in run["chunks"]] == [[1, 2], [4, 5]]
    assert (run["first_token"], run["complete"]) == (6, 7)
    assert (run["exposed"], run["after_kv"], run["after_token"]) == (1.5, 2, 1)
    assert run["decode_begins"] == 2
    assert run["transfer"] == pytest.approx(3 * 64 / 48)  # of 48 tokens in 3 seconds
    assert bound(run) == pytest.approx(2 + 0.002)


def test_rounds_of_a_case_are_ranked() -> None:
    runs = [{"tokens": 1, "transport": "shm", "exposed": exposed} for exposed in (3, 1, 2)]
    runs.append({"tokens": 1, "transport": "tcp", "exposed": 0})
    assert [run["exposed"] for run in of_case(runs, 1, "shm")] == [1, 2, 3]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    from diptych.bench.overlap_picture import draw_overlap

    chunk = {"begin": 0.0, "end": 0.4, "layers": [0.1, 0.3], "verified": [0.2, 0.5]}
    run = {
        "tokens": 512,
        "chunks": [chunk],
        "decodes": [[0.6, 0.7]],
        "computed": 0.35,
        "first_token": 0.4,
        "complete": 0.55,
        "exposed": 0.1,
    }
    draw_overlap([{**run, "transport": "shm"}, {**run, "transport": "tcp"}], tmp_path / "overlap.svg")
    written = (tmp_path / "overlap.svg").read_text()
    assert "first token sampled" in written
    assert "tcp: 512 tokens" in written
