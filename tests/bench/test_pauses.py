from __future__ import annotations

import asyncio

from diptych.bench.pauses import CASES, measure


def test_a_stream_whose_decode_worker_leaves_has_the_right_tokens_and_a_pause() -> None:
    [row] = asyncio.run(measure(CASES[1:2], rounds=1))
    assert row["case"] == "decode worker leaves"
    assert row["longest_pause_ms"] > 0
