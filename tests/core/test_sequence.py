from __future__ import annotations

from diptych.core.request import Request
from diptych.core.sequence import Batch, ScheduledSequence, Sequence

REQUEST = Request(request_id="r", prompt_token_ids=(5, 6, 7))


def test_a_log_continues_anywhere() -> None:
    here = Sequence.from_log(REQUEST)
    here.token_ids += [8, 9]
    there = Sequence.from_log(REQUEST, tuple(here.output_token_ids))
    assert there.token_ids == here.token_ids == [5, 6, 7, 8, 9]
    assert (there.num_prompt_tokens, there.num_output_tokens) == (3, 2)
    assert (there.num_computed_tokens, there.num_uncomputed_tokens) == (0, 5)
    assert there.block_table == []


def test_sequences_are_told_apart_by_identity() -> None:
    one, other = Sequence.from_log(REQUEST), Sequence.from_log(REQUEST)
    assert one != other
    assert len({one, other, one}) == 2


def test_batch_counts_its_tokens() -> None:
    sequence = Sequence.from_log(REQUEST)
    rows = (ScheduledSequence(sequence, 0, 2, samples=False), ScheduledSequence(sequence, 2, 1, samples=True))
    assert [row.end for row in rows] == [2, 3]
    assert Batch(rows).num_tokens == 3
