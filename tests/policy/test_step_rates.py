from __future__ import annotations

import pytest

from diptych.core.request import Request
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.policy.step_rates import StepRates


def batch(*sizes: int) -> Batch:
    sequence = Sequence.from_log(Request(request_id="r", prompt_token_ids=(1,)))
    return Batch(tuple(ScheduledSequence(sequence, 0, size, samples=True) for size in sizes))


def test_pure_steps_teach_and_mixed_ones_do_not() -> None:
    rates = StepRates()
    rates.observe(batch(256, 1), 9.0)
    rates.observe(batch(8), 9.0)
    assert (rates.prefill_rate, rates.decode_step_seconds) == (0.0, 0.0)
    rates.observe(batch(256, 256), 0.25)
    rates.observe(batch(1, 1, 1), 0.01)
    assert (rates.prefill_rate, rates.decode_step_seconds) == (2048.0, 0.01)


def test_newer_steps_count_more() -> None:
    rates = StepRates()
    rates.observe(batch(1), 0.01)
    rates.observe(batch(1), 0.02)
    assert rates.decode_step_seconds == pytest.approx(0.012)
