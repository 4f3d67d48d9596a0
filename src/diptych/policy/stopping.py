"""When a stream of tokens is over. Stop strings need text and are the front's business."""

from __future__ import annotations

from collections.abc import Collection

from diptych.core.request import FinishReason
from diptych.core.sequence import Sequence


def finish_reason(sequence: Sequence, eos_token_ids: Collection[int]) -> FinishReason | None:
    """Whether the newest output token of `sequence` ends it, and why.

    A stop token wins over a length that is reached at the same token. Before `min_tokens` outputs
    stop tokens do not count (the sampler does not choose them then).
    """
    sampling = sequence.request.sampling
    if sequence.num_output_tokens == 0:
        return None
    if sequence.num_output_tokens >= sampling.min_tokens:
        newest = sequence.token_ids[-1]
        if newest in sampling.stop_token_ids or (newest in eos_token_ids and not sampling.ignore_eos):
            return FinishReason.STOP
    if sequence.num_output_tokens >= sampling.max_tokens:
        return FinishReason.LENGTH
    return None
