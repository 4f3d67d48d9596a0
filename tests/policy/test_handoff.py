"""The hand-off tables: what is listed happens, what is not changes nothing, and blocks are released once."""

from __future__ import annotations

import itertools
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.policy.handoff import (
    SOURCE_OWNERS,
    SOURCE_TABLE,
    TARGET_OWNERS,
    TARGET_TABLE,
    Effect,
    Side,
    SourceEvent,
    SourceState,
    TargetEvent,
    TargetState,
    diagram,
    document,
    source_side,
    target_side,
)

SIDES: list[tuple[dict[Any, Any], type[StrEnum], type[StrEnum], Any]] = [
    (SOURCE_TABLE, SourceState, SourceEvent, source_side),
    (TARGET_TABLE, TargetState, TargetEvent, target_side),
]
each_side = pytest.mark.parametrize(("table", "states", "events", "new_side"), SIDES, ids=["source", "target"])
RELEASED = {SourceState.RELEASED, TargetState.RELEASED}
DOCUMENT = Path(__file__).parents[2] / "docs" / "handoff.md"


@each_side
def test_every_pair_of_state_and_event(table: Any, states: Any, events: Any, new_side: Any) -> None:
    for state, event in itertools.product(states, events):
        side = Side(table, state)
        effects = side.on(event)
        if (state, event) in table:
            assert (side.state, effects, side.ignored) == (table[state, event].state, table[state, event].effects, 0)
        else:
            assert (side.state, effects, side.ignored) == (state, (), 1)


@each_side
def test_every_state_is_reached_and_every_event_matters(table: Any, states: Any, events: Any, new_side: Any) -> None:
    assert {new_side().state} | {transition.state for transition in table.values()} == set(states)
    assert {event for _, event in table} == set(events)


@each_side
def test_release_is_the_last_thing_and_the_only_way_out(table: Any, states: Any, events: Any, new_side: Any) -> None:
    """Blocks go back exactly when the state becomes RELEASED, from states where nobody reads or writes
    them any more, and nothing leads out of there."""
    for (state, event), transition in table.items():
        assert state not in RELEASED
        assert (Effect.RELEASE_BLOCKS in transition.effects) == (transition.state in RELEASED)
        if transition.state in RELEASED:
            assert event in (SourceEvent.ACCEPTED, SourceEvent.STOPPED, TargetEvent.WRITER_GONE)


@each_side
@given(data=st.data())
def test_any_history_releases_at_most_once(table: Any, states: Any, events: Any, new_side: Any, data: Any) -> None:
    side, effects, listed = new_side(), [], 0
    for event in data.draw(st.lists(st.sampled_from(list(events)), max_size=12)):
        listed += (side.state, event) in table
        before = side.ignored
        effects += side.on(event)
        if Effect.RELEASE_BLOCKS in effects:
            assert side.state in RELEASED
        assert side.ignored - before in (0, 1)
    for once in Effect:
        assert effects.count(once) <= 1
    if Effect.JOIN_BATCH in effects:  # the blocks are the sequence's now: the hand-off never gives them back
        assert effects == [Effect.JOIN_BATCH]
        assert side.state is TargetState.DECODING


@each_side
def test_from_everywhere_an_end_can_be_reached(table: Any, states: Any, events: Any, new_side: Any) -> None:
    ends = RELEASED | {TargetState.DECODING}
    for start in states:
        reached = {start}
        for _ in states:
            reached |= {transition.state for (state, _), transition in table.items() if state in reached}
        assert reached & ends


@pytest.mark.parametrize("state", [SourceState.PREFILLING, SourceState.OFFERED])
def test_a_source_that_has_pages_out_stops_before_it_releases(state: SourceState) -> None:
    for event in (SourceEvent.ABORTED, SourceEvent.CANCELLED, SourceEvent.REJECTED, SourceEvent.LINK_LOST):
        side = Side(SOURCE_TABLE, state)
        effects = side.on(event)
        assert Effect.STOP_WRITING in effects
        assert (Effect.REPORT_FAILURE in effects) == (event is not SourceEvent.ABORTED)
        assert side.on(event) == ()  # the same news twice
        assert side.on(SourceEvent.STOPPED) == (Effect.RELEASE_BLOCKS,)


def test_the_diagram_lists_every_transition_and_every_owner() -> None:
    rows = [line for line in diagram().splitlines() if line.startswith("| ") and not line.startswith("| state")]
    tables = [(SOURCE_TABLE, SOURCE_OWNERS), (TARGET_TABLE, TARGET_OWNERS)]
    assert rows == [
        f"| {state} | {event} | {transition.state} | {', '.join(transition.effects) or '-'} | {owners[state]} |"
        for table, owners in tables
        for (state, event), transition in table.items()
    ]
    assert (set(SOURCE_OWNERS), set(TARGET_OWNERS)) == (set(SourceState), set(TargetState))


def test_the_document_is_up_to_date() -> None:
    """If this fails: `make docs`."""
    assert DOCUMENT.read_text() == document() + "\n"
    assert diagram() in document()


def test_the_module_prints_the_document() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "diptych.policy.handoff"], capture_output=True, text=True, timeout=60, check=True
    )
    assert printed.stdout == document() + "\n"
