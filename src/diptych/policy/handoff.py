"""The hand-off: how the KV blocks of a sequence change owner, as two tables.

A hand-off has two sides. The *source* prefills and pushes pages; the *target* reserves blocks before
any work is done, takes the pages in, and decodes. Each side follows its own table, so a message that
comes late, twice or never cannot confuse it: a (state, event) pair that the table does not list changes
nothing and is counted.

Who owns what, in every state, is the last column of `diagram()`. Two rules follow from it:
a block is free only when its readers *and* its writers are gone (QUARANTINED, STOPPING), and a page is
visible to attention only in DECODING, where the hand-off is over and the blocks are the sequence's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar


class SourceState(StrEnum):
    PREFILLING = "prefilling"
    OFFERED = "offered"
    STOPPING = "stopping"
    RELEASED = "released"


class SourceEvent(StrEnum):
    ALL_PUSHED = "all pushed"  # the last chunk is computed, its pages and the first token are on their way
    ACCEPTED = "accepted"  # the target has verified and committed every page
    REJECTED = "rejected"  # the target found something wrong
    CANCELLED = "cancelled"  # the target no longer wants it
    ABORTED = "aborted"  # the router no longer wants it, or it needs no decode
    LINK_LOST = "link lost"
    STOPPED = "stopped"  # the sender will not read these blocks again


class TargetState(StrEnum):
    RESERVED = "reserved"
    DECODING = "decoding"
    QUARANTINED = "quarantined"
    RELEASED = "released"


class TargetEvent(StrEnum):
    COMPLETE = "complete"  # every page is here, and verified
    FAILED = "failed"  # a page is wrong, the writer is lost, or it took too long
    ABORTED = "aborted"
    WRITER_GONE = "writer gone"  # nobody can write to these blocks any more


class Effect(StrEnum):
    """What a transition asks of its side, beyond the change of state."""

    STOP_WRITING = "stop writing"  # source: drop what is queued, tell the target when done
    REVOKE_TICKET = "revoke ticket"  # target: accept nothing more, tell when the writer is gone
    REPORT_FAILURE = "report failure"  # tell the router
    JOIN_BATCH = "join batch"  # target: the pages become visible, decode goes on
    RELEASE_BLOCKS = "release blocks"


S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Transition(Generic[S]):
    state: S
    effects: tuple[Effect, ...] = ()


SourceTable = dict[tuple[SourceState, SourceEvent], Transition[SourceState]]
TargetTable = dict[tuple[TargetState, TargetEvent], Transition[TargetState]]

_stop = Transition(SourceState.STOPPING, (Effect.STOP_WRITING,))
_stop_and_report = Transition(SourceState.STOPPING, (Effect.REPORT_FAILURE, Effect.STOP_WRITING))

SOURCE_TABLE: SourceTable = {
    (SourceState.PREFILLING, SourceEvent.ALL_PUSHED): Transition(SourceState.OFFERED),
    (SourceState.PREFILLING, SourceEvent.ABORTED): _stop,
    (SourceState.PREFILLING, SourceEvent.CANCELLED): _stop_and_report,
    (SourceState.PREFILLING, SourceEvent.REJECTED): _stop_and_report,
    (SourceState.PREFILLING, SourceEvent.LINK_LOST): _stop_and_report,
    (SourceState.OFFERED, SourceEvent.ACCEPTED): Transition(SourceState.RELEASED, (Effect.RELEASE_BLOCKS,)),
    (SourceState.OFFERED, SourceEvent.ABORTED): _stop,
    (SourceState.OFFERED, SourceEvent.CANCELLED): _stop_and_report,
    (SourceState.OFFERED, SourceEvent.REJECTED): _stop_and_report,
    (SourceState.OFFERED, SourceEvent.LINK_LOST): _stop_and_report,
    (SourceState.STOPPING, SourceEvent.STOPPED): Transition(SourceState.RELEASED, (Effect.RELEASE_BLOCKS,)),
}

_quarantine = Transition(TargetState.QUARANTINED, (Effect.REVOKE_TICKET,))
_quarantine_and_report = Transition(TargetState.QUARANTINED, (Effect.REPORT_FAILURE, Effect.REVOKE_TICKET))
TARGET_TABLE: TargetTable = {
    (TargetState.RESERVED, TargetEvent.COMPLETE): Transition(TargetState.DECODING, (Effect.JOIN_BATCH,)),
    (TargetState.RESERVED, TargetEvent.FAILED): _quarantine_and_report,
    (TargetState.RESERVED, TargetEvent.ABORTED): _quarantine,
    (TargetState.QUARANTINED, TargetEvent.WRITER_GONE): Transition(TargetState.RELEASED, (Effect.RELEASE_BLOCKS,)),
}

SOURCE_OWNERS: dict[SourceState, str] = {
    SourceState.PREFILLING: "source (scheduler and sender)",
    SourceState.OFFERED: "source (sender)",
    SourceState.STOPPING: "source (sender)",
    SourceState.RELEASED: "nobody",
}

TARGET_OWNERS: dict[TargetState, str] = {
    TargetState.RESERVED: "target (writer), invisible",
    TargetState.DECODING: "target (sequence), visible",
    TargetState.QUARANTINED: "target (writer), invisible",
    TargetState.RELEASED: "nobody",
}


@dataclass(slots=True)
class Side(Generic[S, E]):
    """One side of one hand-off: a state, moved only by its table.

    `ignored` counts events that the table does not list for the state they met.
    """

    table: dict[tuple[S, E], Transition[S]] = field(repr=False)
    state: S
    ignored: int = 0

    def on(self, event: E) -> tuple[Effect, ...]:
        """Follow the table; returns the effects to carry out (none for a late or duplicate event)."""
        transition = self.table.get((self.state, event))
        if transition is None:
            self.ignored += 1
            return ()
        self.state = transition.state
        return transition.effects


def source_side() -> Side[SourceState, SourceEvent]:
    return Side(SOURCE_TABLE, SourceState.PREFILLING)


def target_side() -> Side[TargetState, TargetEvent]:
    return Side(TARGET_TABLE, TargetState.RESERVED)


HEADER = """\
# The hand-off, state by state

Generated from `policy/handoff.py` by `make docs`; a test keeps the two equal.

A hand-off has two sides, and each follows its own table. An event that a table does not list for the state it
meets is late or a duplicate: it changes nothing and is counted. Blocks are free only after `release blocks`, and
pages are visible to attention only in `decoding`.
"""


def document() -> str:
    """What stands in docs/handoff.md (a test keeps that file equal to this)."""
    return f"{HEADER}\n{diagram()}"


def diagram() -> str:
    """Both tables as Markdown."""
    return "\n".join(
        [
            *_table("Source side", SOURCE_TABLE, SOURCE_OWNERS),
            "",
            *_table("Target side", TARGET_TABLE, TARGET_OWNERS),
        ]
    )


def _table(title: str, table: dict[tuple[S, E], Transition[S]], owners: dict[S, str]) -> list[str]:
    lines = [f"## {title}", "", "| state | event | next | effects | owner of the blocks in `state` |"]
    lines.append("|---|---|---|---|---|")
    for (state, event), transition in table.items():
        effects = ", ".join(transition.effects) or "-"
        lines.append(f"| {state} | {event} | {transition.state} | {effects} | {owners[state]} |")
    return lines


if __name__ == "__main__":
    print(document())
