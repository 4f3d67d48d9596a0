from __future__ import annotations

import asyncio

from diptych.bench.pauses import CASES, measure


def test_a_stream_whose_decode_worker_leaves_has_the_right_tokens_and_a_pause() -> None:
    [row], prices = asyncio.run(measure(CASES[1:2], rounds=1, prices=()))
    assert prices == []
    assert row["case"] == "decode worker leaves"
    assert row["longest_pause_ms"] > 0
