"""What copying and hashing cost without a protocol: bare loops over the same bytes, in the same ranges.

One process copies each unit's ranges into the other's memory and hashes them while they are in its cache; the other
one hashes them there, frame by frame, as it is told over a socket pair. Nothing else is done, so a hand-off with one
thread on each side cannot be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from diptych.bench.handoff_cases import Case
from diptych.core.kv_layout import KVMemory
from diptych.policy.digest_units import ByteRun, byte_runs, digest_units
from diptych.policy.resharding import plan_resharding

FRAME_BYTES = 1 << 20

Copy = tuple[int, int, int]  # from, to, bytes


@dataclass(frozen=True, slots=True)
class _Unit:
    copies: list[Copy]
    at_source: list[ByteRun]
    at_target: list[ByteRun]


@dataclass(frozen=True, slots=True)
class _Frame:
    layer: int
    source_rank: int
    target_rank: int
    units: list[_Unit]


def bare_frames(case: Case) -> list[_Frame]:
    """All that a case moves. Both processes compute it, before the clock runs."""
    source, target, tokens = case.source, case.target, range(case.num_tokens)
    by_pair: dict[object, list[_Unit]] = {}
    for unit in digest_units(source.layout, target.layout, tokens):
        ours, theirs = byte_runs(source, unit), byte_runs(target, unit)
        by_pair.setdefault(unit.pair, []).append(_Unit(_copies(ours, theirs), ours, theirs))
    transfers = plan_resharding(source, target, tokens).layers
    pairs = list(by_pair.values())
    frames = []
    for number, transfer in enumerate(transfers):
        units = pairs[number % len(pairs)]
        step = max(FRAME_BYTES // sum(length for _, length in units[0].at_source), 1)
        for start in range(0, len(units), step):
            part = units[start : start + step]
            frames.append(_Frame(transfer.layer, transfer.source_rank, transfer.target_rank, part))
    return frames


def _copies(source: Sequence[ByteRun], target: Sequence[ByteRun]) -> list[Copy]:
    """The ranges that get a unit's bytes from one side's runs to the other's."""
    ours, theirs = list(source[::-1]), list(target[::-1])
    copies = []
    while ours:
        (here, left), (there, room) = ours.pop(), theirs.pop()
        length = min(left, room)
        copies.append((here, there, length))
        if left > length:
            ours.append((here + length, left - length))
        if room > length:
            theirs.append((there + length, room - length))
    return copies


def copy_all(
    frames: Sequence[_Frame],
    sources: Sequence[KVMemory],
    targets: Sequence[KVMemory],
    *,
    announce: Callable[[int], None] | None = None,
) -> None:
    """The source's loop. With `announce`, which is told of each finished frame, it also hashes; without, it only
    copies."""
    for number, frame in enumerate(frames):
        layer = sources[frame.source_rank].layer(frame.layer)
        here = np.frombuffer(layer, np.uint8)
        there = np.frombuffer(targets[frame.target_rank].layer(frame.layer), np.uint8)
        for unit in frame.units:
            for ours, theirs, length in unit.copies:
                there[theirs : theirs + length] = here[ours : ours + length]
            if announce is not None:
                _hash(layer, unit.at_source)
        if announce is not None:
            announce(number)


def hash_frame(frame: _Frame, targets: Sequence[KVMemory]) -> None:
    """What the target does with one finished frame."""
    layer = targets[frame.target_rank].layer(frame.layer)
    for unit in frame.units:
        _hash(layer, unit.at_target)


def _hash(layer: memoryview, runs: Sequence[ByteRun]) -> bytes:
    if len(runs) == 1:
        [(start, length)] = runs
        return xxhash.xxh3_64_digest(layer[start : start + length])
    unit = xxhash.xxh3_64()
    for start, length in runs:
        unit.update(layer[start : start + length])
    return unit.digest()
