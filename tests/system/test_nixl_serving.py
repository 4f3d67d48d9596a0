"""A real server whose pages NIXL writes: right answers, and no worker that spins while nobody asks."""

from __future__ import annotations

import random

import pytest
from server import SCRIPTED, serving

from diptych.engine.scripted import expected_tokens

pytest.importorskip("nixl_cu12", reason="NIXL is not installed")


@pytest.mark.parametrize("transport", ["nixl", "fastest"])
def test_split_answers_are_right(transport: str) -> None:
    chance = random.Random(1)
    prompts = [[chance.randrange(1, 256) for _ in range(chance.randrange(1, 600))] for _ in range(20)]
    with serving(*SCRIPTED, "--transport", transport) as server:
        answers = server.complete_all(prompts, "split", in_flight=4, max_tokens=8)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert f"transport={transport}" in answer.route
            assert answer.token_ids == expected_tokens(prompt, 8)
