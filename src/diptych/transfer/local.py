"""Hand-offs within one process: the same frames over a socket pair, and one copy of the pages."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.core.kv_layout import KVMemory
from diptych.transfer import frames
from diptych.transfer.receiver import KVReceiver
from diptych.wire.blocking import BlockingConnection, socket_pair


@dataclass(frozen=True, slots=True)
class LocalEndpoint:
    """Where pages for a target in this process go. Takes the place of a KVEndpoint in `PushLink`."""

    receiver: KVReceiver

    @property
    def memories(self) -> tuple[KVMemory, ...]:
        return self.receiver.memories

    def dial(self) -> BlockingConnection[frames.FromTarget]:
        """A data connection that needs no proof: nobody else can hold either end."""
        ours, theirs = socket_pair()
        self.receiver.adopt(BlockingConnection(theirs, frames.FromSource))
        return BlockingConnection(ours, frames.FromTarget)
