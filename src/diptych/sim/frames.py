"""What is said on a data connection, as in `transfer.frames`, and the bytes that go with it."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from diptych.core.fleet import Epoch
from diptych.core.kv_layout import ByteRange, KVMemory, LayerTransfer
from diptych.core.request import SampledToken
from diptych.sim.scenario import Spoil


class Begin(NamedTuple):
    request_id: str
    nonce: bytes
    epoch: Epoch


class Go(NamedTuple):
    request_id: str
    nonce: bytes


class Pages(NamedTuple):
    """One layer of a plan. `payload` is None if its bytes are in place already (mapped memory)."""

    request_id: str
    nonce: bytes
    epoch: Epoch
    layer: int
    blocks: range  # logical ones
    transfers: tuple[LayerTransfer, ...]
    digest: int
    payload: tuple[bytes, ...] | None


class Close(NamedTuple):
    request_id: str
    nonce: bytes
    epoch: Epoch
    num_frames: int  # of pages
    token: SampledToken


class Stopped(NamedTuple):
    request_id: str
    nonce: bytes


class Accepted(NamedTuple):
    request_id: str
    nonce: bytes


class Rejected(NamedTuple):
    request_id: str
    nonce: bytes
    code: str
    message: str


class Cancel(NamedTuple):
    request_id: str
    nonce: bytes


Memories = Sequence[KVMemory]  # one for each rank


def read(transfers: Sequence[LayerTransfer], source: Memories) -> tuple[bytes, ...]:
    """The bytes of each range, out of the source's memory as it is now."""
    found: list[bytes] = []
    for transfer in transfers:
        layer = source[transfer.source_rank].layer(transfer.layer)
        found += [bytes(layer[span.source_offset : span.source_offset + span.length]) for span in transfer.ranges]
    return tuple(found)


def write(transfers: Sequence[LayerTransfer], content: Sequence[bytes], target: Memories) -> None:
    """Put the bytes of each range in place. Empty ones have got lost on the way."""
    parts = iter(content)
    for transfer in transfers:
        layer = target[transfer.target_rank].layer(transfer.layer)
        for span, part in zip(transfer.ranges, parts, strict=False):
            if part:
                layer[span.target_offset : span.target_offset + span.length] = part


def digest(content: Sequence[bytes]) -> int:
    """Of what `read` found."""
    checksum = 0
    for part in content:
        checksum = zlib.crc32(part, checksum)
    return checksum


def arrived(transfers: Sequence[LayerTransfer], target: Memories) -> int:
    """The digest of these ranges as they are in the target's memory now."""
    checksum = 0
    for transfer in transfers:
        layer = target[transfer.target_rank].layer(transfer.layer)
        for span in transfer.ranges:
            checksum = zlib.crc32(layer[span.target_offset : span.target_offset + span.length], checksum)
    return checksum


def spoiled(content: tuple[bytes, ...], how: Spoil, rng: random.Random) -> tuple[bytes, ...]:
    """The same bytes, with one of the ranges damaged."""
    parts = list(content)
    victim = rng.randrange(len(parts))
    part = bytearray(parts[victim])
    match how:
        case Spoil.FLIP:
            part[rng.randrange(len(part))] ^= 1 << rng.randrange(8)
        case Spoil.DROP:
            part.clear()
        case Spoil.ZERO:
            part[:] = bytes(len(part))
        case Spoil.FOREIGN:
            part[:] = rng.randbytes(len(part))
    parts[victim] = bytes(part)
    return tuple(parts)


def blocks_read(transfers: Sequence[LayerTransfer], memories: Memories) -> set[tuple[int, int]]:
    """The source's blocks that these ranges lie in, with the ranks that hold them."""
    return {
        (transfer.source_rank, block)
        for transfer in transfers
        for span in transfer.ranges
        for block in _blocks_of(span, memories[transfer.source_rank].layout.block_bytes)
    }


def _blocks_of(span: ByteRange, block_bytes: int) -> range:
    return range(span.source_offset // block_bytes, -(-(span.source_offset + span.length) // block_bytes))
