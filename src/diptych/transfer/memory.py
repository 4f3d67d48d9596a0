"""KV memory that another process can map: an anonymous file (memfd), passed on as a descriptor.

It has no name, so nobody can open it who was not given it, and nothing is left behind when its owner
is killed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

from diptych.core.errors import ConfigError, TransferError
from diptych.core.kv_layout import KVLayout, KVMemory

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # a mapping never loses its ground


def available_memory() -> int:
    """Bytes that this machine can still give without swapping (Linux: MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def touch(memory: memoryview) -> None:
    """Read from every page, so that the first hand-off does not have to wait for the kernel to map them."""
    np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE].max(initial=0)


def scratch_memory(nbytes: int) -> memoryview:
    """Room to work in, given back with its last view. Not out of malloc's heaps: each thread has one of its own, which
    keeps what is freed there, and links with their threads come and go."""
    return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def memory_bytes(layout: KVLayout, num_blocks: int, rank: int) -> int:
    """Size of a rank's KV memory."""
    return len(layout.layers_of(rank)) * num_blocks * layout.block_bytes


class SharedMemory:
    """Zeroed, page-aligned bytes with a descriptor. Close it after all views into it are gone."""

    def __init__(self, nbytes: int) -> None:
        if nbytes > available_memory():  # the kernel would give more than there is, and then kill somebody
            raise ConfigError(_too_much(nbytes, f"{available_memory() / 2**20:,.0f} MiB are available"))
        self.descriptor = os.memfd_create("diptych-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.descriptor, 0, nbytes)  # now, and not by SIGBUS at the first touch
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, SEALS)
            self._map = mmap.mmap(self.descriptor, nbytes)
            touch(self.buffer)
        except OSError as error:
            os.close(self.descriptor)
            raise ConfigError(_too_much(nbytes, str(error.strerror))) from error

    @property
    def buffer(self) -> memoryview:
        return memoryview(self._map)

    def close(self) -> None:
        """Give the memory back. Raises BufferError while somebody still holds a view; it goes with the last
        one then, but nobody else can map it any more."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        self._map.close()


def _too_much(nbytes: int, why: str) -> str:
    return f"{nbytes / 2**20:,.0f} MiB of KV memory cannot be had ({why}); lower --kv-cache-tokens"


def map_memory(descriptor: int, layout: KVLayout, num_blocks: int, rank: int = 0) -> KVMemory:
    """The KV memory of one rank of another worker, from its descriptor (which is closed here; the mapping stays).

    Raises TransferError if the file is not of the size that layout and number of blocks ask for.
    """
    wanted = memory_bytes(layout, num_blocks, rank)
    try:
        size = os.fstat(descriptor).st_size
        if size != wanted or not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise TransferError(f"the target's KV memory has {size} bytes, {wanted} sealed ones were announced")
        mapped = memoryview(mmap.mmap(descriptor, wanted))
        touch(mapped)
        return KVMemory(layout, num_blocks, mapped, rank)
    except OSError as error:
        raise TransferError(f"the target's KV memory cannot be mapped: {error.strerror}") from error
    finally:
        os.close(descriptor)
