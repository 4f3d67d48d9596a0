"""How a source comes to write with NIXL: it connects, and may measure first whether that is any faster than frames."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from diptych.core.errors import HandshakeError
from diptych.core.kv_layout import KVMemory
from diptych.core.ports import PageSource
from diptych.transfer import frames
from diptych.transfer.frames import SCRATCH_BYTES
from diptych.transfer.nixl import NixlWriter
from diptych.transfer.writers import InlineWriter, PageWriter
from diptych.wire.blocking import STALL_SECONDS, BlockingConnection

log = logging.getLogger(__name__)

NUM_PROBES = 5  # the first of which connects, or fills buffers


def nixl_writer(
    connection: BlockingConnection[frames.FromTarget],
    welcome: frames.PushWelcome,
    sources: Sequence[PageSource],
    *,
    measure: bool,
) -> PageWriter:
    """Connect NIXL, and warm it up with writes of SCRATCH_BYTES that mean nothing. With `measure`, frames of that size
    are sent as well, and the faster way is taken. Raises HandshakeError or TransferError if there is no NIXL."""
    memory = connection.receive(STALL_SECONDS)
    if not isinstance(memory, frames.NixlWelcome):
        raise HandshakeError("it did not say where NIXL may write")
    registered = [source.buffer for source in sources if isinstance(source, KVMemory)]
    writer = NixlWriter(welcome, memory, registered)
    payload = memoryview(bytes(SCRATCH_BYTES))

    def send_frame() -> None:
        connection.send(frames.Probe(SCRATCH_BYTES), [payload])
        if not isinstance(connection.receive(STALL_SECONDS), frames.Probed):
            raise HandshakeError("it did not answer a probe")

    written = gb_per_second(writer.probe)
    if not measure:
        log.info("NIXL writes %.2f GB/s to this target", written)
        return writer
    sent = gb_per_second(send_frame)
    log.info("NIXL writes %.2f GB/s to this target, frames take %.2f GB/s", written, sent)
    if written >= sent:
        return writer
    writer.close()
    return InlineWriter()


def gb_per_second(move: Callable[[], None]) -> float:
    """The best of some moves of SCRATCH_BYTES."""
    seconds = []
    for _ in range(NUM_PROBES):
        begin = time.perf_counter()
        move()
        seconds.append(time.perf_counter() - begin)
    return SCRATCH_BYTES / min(seconds[1:]) / 1e9
