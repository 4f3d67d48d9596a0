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

EVENTS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["token", "block", "preempt", "swap", "replace", "forget", "step"])),
    max_size=60,
)


def new_sequence(name: int, length: int) -> Sequence:
    return Sequence.from_log(Request(request_id=str(name), prompt_token_ids=tuple(range(length))), (7,))


@given(EVENTS)
def test_copies_are_faithful(events: list[tuple[int, str]]) -> None:
    teller, mirror = Teller(), Mirror()
    sequences = [new_sequence(name, name + 1) for name in range(3)]
    for number, (name, event) in enumerate(events):
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
            case _:
                row = ScheduledSequence(sequence, 0, number, True)
                message = msgspec.msgpack.decode(msgspec.msgpack.encode(teller.tell(row)), type=Row)
                copied = mirror.row(message)
                copy = copied.sequence
                assert (copied.start, copied.num_tokens, copied.samples) == (0, number, True)
                assert (copy.request, copy.token_ids) == (sequence.request, sequence.token_ids)
                assert copy.block_table == sequence.block_table
                assert copy.num_prompt_tokens == sequence.num_prompt_tokens


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
