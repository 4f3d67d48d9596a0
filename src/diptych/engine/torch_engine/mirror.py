"""Sequences in two places: the leader tells ranks what is new about each, the ranks keep copies.

Logs and block tables are long, and from one step to the next they gain a token and, now and then, a block. So
only that is sent. Anything else that may happen to a sequence (preempted, other blocks, another sequence under
the same id) shows in a comparison with what was told before.
"""

from __future__ import annotations

from dataclasses import dataclass

from diptych.core.blocks import BlockId
from diptych.core.sequence import ScheduledSequence, Sequence
from diptych.engine.torch_engine.rank_messages import Row


@dataclass(slots=True)
class _Told:
    sequence: Sequence
    num_tokens: int
    blocks: list[BlockId]


class Teller:
    """The leader's side, for ranks that are all told the same."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}

    def tell(self, row: ScheduledSequence) -> Row:
        """A row of a step as a message."""
        sequence = row.sequence
        told = self._told.get(sequence.request_id)
        is_new = told is None or told.sequence is not sequence
        if told is None or is_new:
            told = _Told(sequence, sequence.num_prompt_tokens, [])
            self._told[sequence.request_id] = told
        kept = len(told.blocks)
        if sequence.block_table[:kept] != told.blocks:
            kept = 0
        message = Row(
            request_id=sequence.request_id,
            request=sequence.request if is_new else None,
            tokens=sequence.token_ids[told.num_tokens :],
            kept_blocks=kept,
            blocks=sequence.block_table[kept:],
            start=row.start,
            num_tokens=row.num_tokens,
            samples=row.samples,
        )
        told.num_tokens = sequence.num_tokens
        told.blocks[kept:] = message.blocks
        return message

    def forget(self, request_id: str) -> bool:
        """Whether the ranks know of it."""
        return self._told.pop(request_id, None) is not None


class Mirror:
    """A rank's side."""

    def __init__(self) -> None:
        self._sequences: dict[str, Sequence] = {}

    def row(self, message: Row) -> ScheduledSequence:
        """A share of this rank's copy, brought up to date. Raises KeyError for a sequence it was never told of."""
        if message.request is not None:
            self._sequences[message.request_id] = Sequence.from_log(message.request)
        sequence = self._sequences[message.request_id]
        sequence.token_ids += message.tokens
        sequence.block_table[message.kept_blocks :] = message.blocks
        return ScheduledSequence(sequence, message.start, message.num_tokens, message.samples)

    def forget(self, request_id: str) -> None:
        self._sequences.pop(request_id, None)
