"""NIXL as the way in which pages reach the target: written from outside into memory that it has registered.

NIXL (https://github.com/ai-dynamo/nixl) takes UCX for main memory, and UCX takes what there is: RDMA, copies
between processes of one kernel, or TCP. Everything that is said about pages stays on our own connection.

* Each link has an agent of its own on either side, and it lasts as long as the link. Closing the target's agent
  ends what is still on its way over a network: its sockets and queue pairs are gone, its memory is registered no
  more. Where the kernel copies from process to process, a copy is over before the source's connection ends, as
  with mapped memory. So blocks come out of quarantine when the source has said `Stopped` (which it does only
  after its transfers are done), or else after the source's connections have ended *and* the agent is closed.
* NIXL's progress thread spins unless it is given a delay, which its Python class sets to 0; the agent is made here
  so that this thread sleeps in `poll` until there is something to do (`PROGRESS_MICROSECONDS` at most, in case
  UCX misses a wake-up). A source that waits for the end of a transfer sleeps between its looks.
* NIXL has no authentication, and does not encrypt: whoever reaches the ports that UCX opens may write.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import queue
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from diptych.core.errors import ConfigError, TransferError
from diptych.core.kv_layout import KVMemory, LayerTransfer
from diptych.transfer import frames
from diptych.transfer.frames import SCRATCH_BYTES
from diptych.transfer.pieces import PIECE_BYTES, Piece
from diptych.transfer.places import Numbers
from diptych.transfer.writers import Payload
from diptych.wire.blocking import STALL_SECONDS

TRANSPORTS = frozenset({"nixl", "fastest"})  # KVEndpoint.transport: always, or if it is faster than frames
MODULES = ("nixl._api", "nixl_cu12._api", "nixl_cu13._api")
PROGRESS_MICROSECONDS = 100_000
FIRST_LOOK_SECONDS, LAST_LOOK_SECONDS = 20e-6, 1e-3  # between looks at a transfer: doubled from the one to the other
MAX_METADATA_BYTES = 64 << 10
MAX_ADDRESS = 1 << 56

Descriptors = npt.NDArray[np.uint64]  # [n, 3]: address, bytes, device (0)


@functools.cache
def load() -> Any:
    """NIXL's Python module. Raises ConfigError if it is not installed."""
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        logging.getLogger("nixl").setLevel(logging.WARNING)  # its own handler writes to standard output
        return module
    raise ConfigError("the transport nixl needs NIXL: pip install 'diptych[nixl]'")


def stay_on_this_host() -> None:
    """Have UCX open its ports on the loopback interface only, unless the operator says otherwise. To be called
    before the first agent is made."""
    os.environ.setdefault("UCX_NET_DEVICES", "lo")


def address_of(memory: memoryview) -> int:
    """Where bytes lie."""
    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return address


class Agent:
    """One side of one link. Any number of threads may write; only one may close, after the others are done.

    Raises TransferError whenever NIXL fails.
    """

    def __init__(self, name: str) -> None:
        api = load()
        config = api.nixlBind.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = PROGRESS_MICROSECONDS
        config.syncMode = api.nixlBind.NIXL_THREAD_SYNC_STRICT
        self._agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        self._agent.agent = api.nixlBind.nixlAgent(name, config)
        self._registered: list[Any] = []
        self._peer = ""
        self._do(self._agent.create_backend, "UCX")

    @staticmethod
    def _do(function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # the bindings' exceptions have no common base
            raise TransferError(f"NIXL: {type(error).__name__} {error}") from error

    @property
    def metadata(self) -> bytes:
        """What the other side needs to reach the memory that is registered now."""
        metadata: bytes = self._do(self._agent.get_agent_metadata)
        return metadata

    def register(self, memory: memoryview) -> None:
        """Make memory known; it has to last as long as the agent."""
        region = (address_of(memory), len(memory), 0, "")
        self._registered.append(self._do(self._agent.register_memory, [region], "DRAM"))

    def meet(self, metadata: bytes) -> None:
        """Whom to write to from now on."""
        name = self._do(self._agent.add_remote_agent, metadata)
        self._peer = name.decode() if isinstance(name, bytes) else name

    def write(self, ours: Descriptors, theirs: Descriptors) -> None:
        """Copy our ranges into theirs, one by one. When this returns, all of it is there."""
        handle = self._do(
            self._agent.initialize_xfer,
            "WRITE",
            self._agent.get_xfer_descs(ours, "DRAM"),
            self._agent.get_xfer_descs(theirs, "DRAM"),
            self._peer,
        )
        try:
            self._wait(handle)
        finally:
            self._do(handle.release)

    def _wait(self, handle: Any) -> None:
        deadline = time.monotonic() + STALL_SECONDS
        pause = FIRST_LOOK_SECONDS
        state = self._do(self._agent.transfer, handle)
        while state == "PROC":
            if time.monotonic() > deadline:
                raise TransferError(f"NIXL: a transfer has not ended after {STALL_SECONDS} s")
            time.sleep(pause)
            pause = min(2 * pause, LAST_LOOK_SECONDS)
            state = self._do(self._agent.check_xfer_state, handle)
        if state != "DONE":
            raise TransferError(f"NIXL: a transfer ended as {state}")

    def close(self) -> None:
        """End whatever is still on its way from or to here, and its thread. Idempotent."""
        agent, self._agent = self._agent, None
        if agent is not None:
            for registered in self._registered:
                agent.deregister_memory(registered)
            self._registered.clear()


class NixlTarget:
    """The target's side of one link: `memories` of all its ranks, in order, which the source may write to."""

    def __init__(self, link: bytes, memories: Sequence[KVMemory]) -> None:
        self._agent = Agent(f"target-{link.hex()}")
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))
        for memory in (*(memory.buffer for memory in memories), self.scratch):
            self._agent.register(memory)
        bases = tuple(address_of(memory.buffer) for memory in memories)
        self.welcome = frames.NixlWelcome(self._agent.metadata, bases, address_of(self.scratch))

    def close(self) -> None:
        """When this returns, nothing that the source has under way over a network can arrive any more."""
        self._agent.close()


class NixlWriter:
    """Into the memory of a target's ranks, as its welcome describes it. `sources` is memory that is registered, so
    that it need not be copied first. A `PageWriter`; several threads may write."""

    def __init__(self, welcome: frames.PushWelcome, memory: frames.NixlWelcome, sources: Sequence[memoryview]) -> None:
        ranks = range(welcome.layout.world_size)
        addresses = (*memory.bases, memory.scratch)
        if len(memory.bases) != len(ranks) or len(memory.metadata) > MAX_METADATA_BYTES:
            raise TransferError("the target's NIXL memory is not that of its ranks")
        if not all(0 < address < MAX_ADDRESS for address in addresses):
            raise TransferError("the target's NIXL memory has no such address")
        self._layout = welcome.layout
        self._layer_bytes = welcome.num_blocks * welcome.layout.block_bytes
        self._memory = memory
        self._agent = Agent(f"source-{welcome.link.hex()}")
        self._ours: list[tuple[int, int]] = []  # where the sources lie
        self._copies: queue.SimpleQueue[memoryview] = queue.SimpleQueue()  # registered, and free
        self._keep: list[memoryview] = []
        for source in sources:
            self._register(source)
            self._ours.append((address_of(source), address_of(source) + len(source)))
        self._agent.meet(memory.metadata)

    def needs_staging(self, piece: Piece) -> bool:
        """NIXL takes any number of ranges, but each of them costs about a microsecond."""
        return not piece.source.are_long

    def write(
        self, transfer: LayerTransfer, piece: Piece, layer: memoryview, staged: memoryview | None = None
    ) -> Payload:
        """Write now; all of it is there when this returns."""
        piece.target.check(self._layer_bytes)
        layers = self._layout.layers_of(transfer.target_rank)
        if transfer.layer not in layers:
            raise TransferError(f"rank {transfer.target_rank} of the target has no layer {transfer.layer}")
        there = self._memory.bases[transfer.target_rank] + (transfer.layer - layers.start) * self._layer_bytes
        theirs = there + piece.target.starts, piece.target.lengths
        if staged is None and self._is_registered(layer):
            ours = address_of(layer) + piece.source.starts, piece.source.lengths
            self._agent.write(*descriptors(ours, theirs))
        else:
            self._write_copy(piece.source.views(layer) if staged is None else [staged], theirs)
        return ()

    def probe(self) -> None:
        """Write something of SCRATCH_BYTES to where it does no harm."""
        content = memoryview(bytes(SCRATCH_BYTES))
        self._write_copy([content], (np.array([self._memory.scratch]), np.array([SCRATCH_BYTES])))

    def close(self) -> None:
        """No thread writes any more: end the agent."""
        self._agent.close()
        self._keep.clear()

    def _is_registered(self, layer: memoryview) -> bool:
        first = address_of(layer)
        return any(start <= first and first + len(layer) <= end for start, end in self._ours)

    def _write_copy(self, content: Sequence[memoryview], theirs: tuple[Numbers, Numbers]) -> None:
        """Write what does not lie in registered memory."""
        nbytes = sum(map(len, content))
        copy = self._free_copy(nbytes)
        try:
            done = 0
            for part in content:
                copy[done : done + len(part)] = part
                done += len(part)
            self._agent.write(*descriptors((np.array([address_of(copy)]), np.array([nbytes])), theirs))
        finally:
            self._copies.put(copy)

    def _free_copy(self, nbytes: int) -> memoryview:
        """Registered memory of at least this size. (A smaller one is left alone; it goes with the agent.)"""
        while not self._copies.empty():
            try:
                copy = self._copies.get_nowait()
            except queue.Empty:  # another thread was faster
                break
            if len(copy) >= nbytes:
                return copy
        copy = memoryview(bytearray(max(nbytes, PIECE_BYTES)))
        self._register(copy)
        return copy

    def _register(self, memory: memoryview) -> None:
        self._agent.register(memory)
        self._keep.append(memory)


def descriptors(ours: tuple[Numbers, Numbers], theirs: tuple[Numbers, Numbers]) -> tuple[Descriptors, Descriptors]:
    """Two descriptions (addresses, lengths) of equally many bytes, cut at the ends of the runs of either."""
    ends = [np.cumsum(lengths) for _, lengths in (ours, theirs)]
    cuts = np.union1d(*ends)
    starts = np.concatenate(([0], cuts[:-1]))
    sides = []
    for (addresses, lengths), side_ends in zip((ours, theirs), ends, strict=True):
        run = np.searchsorted(side_ends, starts, side="right")
        inside = starts - (side_ends[run] - lengths[run])
        sides.append(np.stack((addresses[run] + inside, cuts - starts, np.zeros_like(cuts)), axis=1).astype(np.uint64))
    return sides[0], sides[1]
