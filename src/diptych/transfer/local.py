"""The in-process transport: source and target in one process, each able to address the other's memory.

The data connection is a socket pair, so everything else (leave to write, digests, quarantine) is as it is
between processes; pages are copied from memory to memory.
"""

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
    def memory(self) -> KVMemory:
        return self.receiver.memory

    def dial(self) -> BlockingConnection[frames.FromTarget]:
        """A data connection that needs no proof: nobody else can hold either end."""
        ours, theirs = socket_pair()
        self.receiver.adopt(BlockingConnection(theirs, frames.FromSource))
        return BlockingConnection(ours, frames.FromTarget)
