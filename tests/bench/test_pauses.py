from __future__ import annotations

import asyncio

import pytest

from diptych.bench import pauses


def test_a_stream_whose_decode_worker_leaves_has_the_right_tokens_and_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "PROMPT_TOKENS", 500)
    monkeypatch.setattr(pauses, "SETTLE_SECONDS", 0.0)
    [row], prices = asyncio.run(pauses.measure(pauses.CASES[1:2], rounds=1, prices=()))
    assert prices == []
    assert row["case"] == "decode worker leaves"
    assert row["longest_pause_ms"] > 0
