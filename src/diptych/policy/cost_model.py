"""Predictions in seconds, from what workers report about themselves.

Until a worker has measured its own rates, the defaults stand in; they only have to be of the right
order, since routing compares workers with each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from diptych.core.fleet import WorkerView


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What things cost before anybody has measured.

    Attributes:
        prefill_rate: tokens/s.
        decode_step_seconds: of a step with one sequence.
        handoff_seconds: fixed price of a split: two more messages, one more process.
        link_bytes_per_second: between two workers.
        pipelined_share: the part of a transfer that layer pipelining cannot hide (about one layer).
        stall_weight: how many seconds of waiting for a first token a running stream's standing still for
            a second is worth. Readers notice a pause more than a late start.
    """

    prefill_rate: float = 2000.0
    decode_step_seconds: float = 0.01
    handoff_seconds: float = 0.005
    link_bytes_per_second: float = 1e9
    pipelined_share: float = 0.125
    stall_weight: float = 4.0

    def prefill_seconds(self, worker: WorkerView, num_tokens: float) -> float:
        """Time to compute the KV of `num_tokens` tokens on this worker, alone."""
        return num_tokens / (worker.stats.prefill_rate or self.prefill_rate)

    def exposed_transfer_seconds(self, worker: WorkerView, num_tokens: int) -> float:
        """Time by which a hand-off of `num_tokens` tokens delays the second token."""
        moved = num_tokens * worker.token_bytes
        return self.handoff_seconds + self.pipelined_share * moved / self.link_bytes_per_second

    def decode_seconds(self, worker: WorkerView, num_sequences: int) -> float:
        """Time of a decode step with `num_sequences` sequences: a floor (weights), and a share each."""
        floor = worker.stats.decode_step_seconds or self.decode_step_seconds
        return floor * (1 + 0.1 * num_sequences)
