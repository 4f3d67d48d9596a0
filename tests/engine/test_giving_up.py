"""Steps that are given up: they end after the layer at hand, and leave nothing behind that anybody would notice."""

from __future__ import annotations

import pytest
from torch_harness import Harness, expected_tokens, random_prompt

from diptych.core.errors import StepAbandoned
from diptych.core.kv_layout import PrivateMemory
from diptych.core.request import Request
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.engine.scripted import ScriptedEngine, ScriptedModel
from diptych.sim.flags import RaisedAfter

NUM_TOKENS = 8


def share(sequence: Sequence, num_tokens: int) -> ScheduledSequence:
    start = sequence.num_computed_tokens
    return ScheduledSequence(sequence, start, num_tokens, samples=start + num_tokens == sequence.num_tokens)


@pytest.mark.parametrize("layers", range(3))
@pytest.mark.parametrize("dense_limit", [0, 512 << 20])
def test_who_was_in_a_step_that_was_given_up_has_the_right_tokens_all_the_same(layers: int, dense_limit: int) -> None:
    harness = Harness("llama", dense_limit=dense_limit)
    prompts = [random_prompt(length) for length in (20, 70, 90)]
    decoding, prompt, gone = (harness.sequence(prompt) for prompt in prompts)
    harness.step((decoding, 20))
    harness.step((decoding, 1), (prompt, 33))
    seen: list[int] = []
    for sequence in (decoding, prompt, gone):
        harness.make_room(sequence, sequence.num_tokens)
    batch = Batch((share(decoding, 1), share(prompt, 37), share(gone, 90)))
    with pytest.raises(StepAbandoned):
        harness.engine.step(batch, seen.append, RaisedAfter(layers))
    assert seen == list(range(layers))
    harness.give_back(gone)
    harness.generate([decoding, prompt], NUM_TOKENS)
    for sequence, wanted in zip((decoding, prompt), prompts, strict=False):
        assert sequence.output_token_ids == expected_tokens("llama", wanted, NUM_TOKENS)


def test_a_flag_that_is_raised_too_late_changes_nothing() -> None:
    harness = Harness("llama")
    sequence = harness.sequence(random_prompt(40))
    harness.make_room(sequence, 40)
    [token] = harness.engine.step(Batch((share(sequence, 40),)), None, RaisedAfter(3))
    assert token is not None
    assert [token.token_id] == expected_tokens("llama", random_prompt(40), 1)


def test_the_scripted_engine_reports_no_layer_after_that() -> None:
    engine = ScriptedEngine(ScriptedModel(num_layers=4))
    engine.allocate_kv(2, PrivateMemory)
    sequence = Sequence.from_log(Request(request_id="r", prompt_token_ids=(65, 66)))
    sequence.block_table = [1]
    seen: list[int] = []
    with pytest.raises(StepAbandoned):
        engine.step(Batch((share(sequence, 2),)), seen.append, RaisedAfter(2))
    assert seen == [0, 1]
