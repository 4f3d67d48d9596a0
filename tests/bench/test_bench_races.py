from __future__ import annotations

import asyncio

import pytest

from diptych.bench import races


def test_raced_prompts_have_the_right_answers_and_a_time_to_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(races, "PROMPT_TOKENS", 300)
    alone, raced = asyncio.run(races.measure(rounds=1, frozen_rounds=0))[:2]
    assert (alone["race"], raced["race"]) == (1, 2)
    assert alone["median_ttft_ms"] > 0
    assert raced["median_ttft_ms"] > 0
