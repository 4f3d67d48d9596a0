"""A rank's copies of sequences are what the leader has, whatever happened to them since the last step."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.request import Request
from diptych.core.sequence import ScheduledSequence, Sequence
from diptych.engine.torch_engine.mirror import Mirror, Teller
from diptych.engine.torch_engine.rank_messages import Row

HAPPENINGS = ["token", "block", "preempt", "swap", "replace", "forget"]
# Which sequence, what happens to it, and whether it takes part in a step then.
EVENTS = st.lists(st.tuples(st.integers(0, 1), st.sampled_from(HAPPENINGS), st.booleans()), max_size=40)


def new_sequence(name: int, length: int) -> Sequence:
    return Sequence.from_log(Request(request_id=str(name), prompt_token_ids=tuple(range(length))), (7,))


@given(EVENTS)
def test_copies_are_faithful(events: list[tuple[int, str, bool]]) -> None:
    teller, mirror = Teller(), Mirror()
    sequences = [new_sequence(name, name + 1) for name in range(2)]
    for number, (name, event, steps) in enumerate(events):
        sequence = sequences[name]
        match event:
            case "token":
                sequence.token_ids.append(number)
            case "block":
                sequence.block_table.append(number)
            case "preempt":
                sequence.block_table = [number]
            case "swap":
                sequence.block_table[-1:] = [number]
            case "replace":
                sequences[name] = new_sequence(name, number + 1)
            case "forget":
                teller.forget(str(name))
                mirror.forget(str(name))
        if steps:
            original = sequences[name]
            told = teller.tell(ScheduledSequence(original, 0, number, True))
            row = mirror.row(msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=Row))
            assert (row.start, row.num_tokens, row.samples) == (0, number, True)
            copy = row.sequence
            assert (copy.request, copy.token_ids) == (original.request, original.token_ids)
            assert copy.block_table == original.block_table
            assert copy.num_prompt_tokens == original.num_prompt_tokens


def test_only_what_is_new_is_told() -> None:
    teller = Teller()
    sequence = new_sequence(0, 100)
    sequence.block_table = [5, 6, 7]
    row = ScheduledSequence(sequence, 100, 1, True)
    first = teller.tell(row)
    assert (first.request, first.tokens, first.kept_blocks, first.blocks) == (sequence.request, [7], 0, [5, 6, 7])
    again = teller.tell(row)
    assert (again.request, again.tokens, again.kept_blocks, again.blocks) == (None, [], 3, [])
    sequence.token_ids.append(9)
    sequence.block_table.append(1)
    more = teller.tell(row)
    assert (more.request, more.tokens, more.kept_blocks, more.blocks) == (None, [9], 3, [1])
    assert teller.forget("0")
    assert not teller.forget("0")
    assert teller.tell(row).request == sequence.request


def test_a_sequence_that_a_rank_was_never_told_of() -> None:
    teller = Teller()
    row = ScheduledSequence(new_sequence(0, 3), 0, 3, True)
    teller.tell(row)
    with pytest.raises(KeyError):
        Mirror().row(teller.tell(row))
