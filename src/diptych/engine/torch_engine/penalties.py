"""Penalties for what a sequence already holds: a fold over its log, kept up to date."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.core.request import SamplingParams
from diptych.core.sequence import Sequence


def needs_counts(params: SamplingParams) -> bool:
    """Whether any penalty is in force."""
    return bool(params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0)


class PenaltyCounts:
    """How often each token stands in the output, and whether it stands anywhere in the log."""

    def __init__(self, sequence: Sequence, vocab_size: int, device: torch.device) -> None:
        self._sequence = sequence
        self._num_folded = 0
        self._in_log = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._in_output = torch.zeros(vocab_size, dtype=torch.float32, device=device)

    def belongs_to(self, sequence: Sequence) -> bool:
        """Whether this counts that very log. A resumed log is another object: its counts start over."""
        return self._sequence is sequence and self._num_folded <= sequence.num_tokens

    def catch_up(self) -> None:
        """Fold in what the log has gained."""
        log, start = self._sequence.token_ids, self._num_folded
        new = torch.tensor(log[start:], dtype=torch.int64, device=self._in_log.device)
        self._in_log[new] = True
        output = new[max(0, self._sequence.num_prompt_tokens - start) :]
        self._in_output.index_add_(0, output, torch.ones_like(output, dtype=torch.float32))
        self._num_folded = len(log)

    def apply(self, scores: Tensor, params: SamplingParams) -> None:
        """Penalise one row of logits [vocab_size] in place.

        Repetition as in CTRL (Keskar et al. 2019): positive scores are divided, negative multiplied.
        Frequency and presence as OpenAI defines them, over the output alone.
        """
        if params.repetition_penalty != 1.0:
            seen = scores[self._in_log]
            penalty = params.repetition_penalty
            scores[self._in_log] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if params.frequency_penalty or params.presence_penalty:
            scores -= params.frequency_penalty * self._in_output + params.presence_penalty * (self._in_output > 0)
