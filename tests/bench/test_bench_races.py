from __future__ import annotations

import asyncio

from diptych.bench.races import measure


def test_raced_prompts_have_the_right_answers_and_a_time_to_first_token() -> None:
    alone, raced = asyncio.run(measure(rounds=1, frozen_rounds=0))[:2]
    assert (alone["race"], raced["race"]) == (1, 2)
    assert alone["median_ttft_ms"] > 0
    assert raced["median_ttft_ms"] > 0
