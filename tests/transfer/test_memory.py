"""Memory that two processes share: given whole, sealed, and gone with its owner."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile

import numpy as np
import pytest

from diptych.core.errors import ConfigError, TransferError
from diptych.core.kv_layout import KVLayout, KVMemory, LayerTransfer
from diptych.transfer.memory import SharedMemory, map_memory
from diptych.transfer.pieces import Piece
from diptych.transfer.places import Places
from diptych.transfer.streams import Stream
from diptych.transfer.writers import MappedWriter

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, dtype="uint8", block_size=16)
NUM_BLOCKS = 3
SIZE = LAYOUT.num_layers * NUM_BLOCKS * LAYOUT.block_bytes


def test_what_one_writes_the_other_sees() -> None:
    segment = SharedMemory(SIZE)
    assert not any(segment.buffer)
    assert not os.get_inheritable(segment.descriptor)
    mapped = map_memory(os.dup(segment.descriptor), LAYOUT, NUM_BLOCKS)
    mapped.layer(1)[5:8] = b"abc"
    start = NUM_BLOCKS * LAYOUT.block_bytes + 5
    assert segment.buffer[start : start + 3] == b"abc"
    segment.close()
    assert mapped.layer(1)[5:8] == b"abc"  # a mapping outlives its owner


def test_nobody_takes_the_ground_away() -> None:
    segment = SharedMemory(SIZE)
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(OSError) as refused:  # noqa: PT011 - the number is what counts
            os.truncate(segment.descriptor, size)
        assert refused.value.errno == errno.EPERM
    segment.close()


def test_it_cannot_be_closed_under_a_view() -> None:
    segment = SharedMemory(SIZE)
    view = segment.buffer
    with pytest.raises(BufferError):
        segment.close()
    view.release()
    segment.close()


def test_more_than_there_is() -> None:
    with pytest.raises(ConfigError, match="lower --kv-cache-tokens"):
        SharedMemory(1 << 60)


@pytest.mark.parametrize("num_blocks", [0, NUM_BLOCKS - 1, NUM_BLOCKS + 1, 2**40])
def test_another_size_than_announced(num_blocks: int) -> None:
    segment = SharedMemory(SIZE)
    given = os.dup(segment.descriptor)
    with pytest.raises(TransferError, match="bytes"):
        map_memory(given, LAYOUT, num_blocks)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(given)  # closed all the same
    segment.close()


def test_a_file_that_could_shrink_is_not_mapped() -> None:
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.truncate(unsealed, SIZE)
    with pytest.raises(TransferError, match="sealed"):
        map_memory(unsealed, LAYOUT, NUM_BLOCKS)
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        with pytest.raises(TransferError, match="cannot be mapped"):
            map_memory(os.dup(file.fileno()), LAYOUT, NUM_BLOCKS)


@pytest.mark.parametrize("span", [(-1, 1), (SIZE // LAYOUT.num_layers, 1), (0, SIZE // LAYOUT.num_layers + 1)])
def test_nothing_leaves_its_layer(span: tuple[int, int]) -> None:
    outside = Places(np.array([8, span[0]]), np.array([8, span[1]]))
    inside = Places(np.array([0]), np.array([outside.nbytes]))
    source = KVMemory(LAYOUT, NUM_BLOCKS, memoryview(b"s" * SIZE))
    target = KVMemory(LAYOUT, NUM_BLOCKS, memoryview(mmap.mmap(-1, SIZE)))
    for staged in (None, memoryview(b"s" * outside.nbytes)):
        piece = Piece(0, inside, outside, [outside.nbytes], None, None)
        with pytest.raises(TransferError, match="leave a layer"):
            MappedWriter([target]).write(LayerTransfer(0, 0, 0, ()), piece, source.layer(0), staged)
        piece = Piece(0, outside, inside, [outside.nbytes], None, None)
        with pytest.raises(TransferError, match="leave a layer"):
            Stream().write(MappedWriter([target]), [LayerTransfer(0, 0, 0, ())], [piece], [source])
    assert not any(target.buffer)  # all or nothing
