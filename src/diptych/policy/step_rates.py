"""How fast this worker is, learnt from its own steps; the router predicts with these figures."""

from __future__ import annotations

from diptych.core.sequence import Batch

WEIGHT = 0.2  # of the newest step in the running means
MIN_PREFILL_TOKENS = 64  # shorter steps are mostly overhead and say little about the rate


class StepRates:
    """Exponentially weighted means over pure prefill and pure decode steps.

    `prefill_rate` is in tokens/s, `decode_step_seconds` in seconds; both 0 until measured.
    """

    def __init__(self) -> None:
        self.prefill_rate = 0.0
        self.decode_step_seconds = 0.0

    def observe(self, batch: Batch, seconds: float) -> None:
        """Take one finished step into account. Mixed steps say nothing about either phase."""
        if seconds <= 0:
            return
        if all(row.num_tokens == 1 for row in batch.rows):
            self.decode_step_seconds = _blend(self.decode_step_seconds, seconds)
        elif all(row.num_tokens > 1 for row in batch.rows) and batch.num_tokens >= MIN_PREFILL_TOKENS:
            self.prefill_rate = _blend(self.prefill_rate, batch.num_tokens / seconds)


def _blend(mean: float, newest: float) -> float:
    return newest if mean == 0 else mean + WEIGHT * (newest - mean)
