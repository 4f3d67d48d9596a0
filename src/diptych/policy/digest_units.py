"""Which bytes a digest covers, so that both sides of a hand-off can compute it from their own cut.

A unit is (layer, the KV heads that one pair of ranks shares, an aligned group of tokens). Its content is
put in logical order: by token run (`resharding.token_runs`), then K before V, then head, then token. Neither
block ids, nor block sizes, nor the other heads of a rank have a part in it, so it survives re-sharding:
hashing the runs of bytes that `byte_runs` gives, one after the other, yields the same on both sides.

    num_layers * len(head_pairs) * number of groups      digests make up a plan

Between equal layouts, and with the default group, a unit is one block of one layer, and one run of bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diptych.core.kv_layout import KVLayout, SequenceKV
from diptych.policy.resharding import HeadPair, head_pairs, token_runs

ByteRun = tuple[int, int]  # offset from the start of a rank's layer, length


@dataclass(frozen=True, slots=True)
class DigestUnit:
    """What one digest covers, in every layer alike."""

    pair: HeadPair
    runs: tuple[range, ...]  # of tokens, each in one block on both sides


def digest_units(source: KVLayout, target: KVLayout, tokens: range, group: int | None = None) -> list[DigestUnit]:
    """The units of one layer, by pair and then by tokens. `group` tokens share a digest, in groups that
    begin at multiples of it; by default as few as have whole blocks on both sides.

    Raises ValueError if a group would cut a block.
    """
    whole = math.lcm(source.block_size, target.block_size)
    group = whole if group is None else group
    if group < 1 or group % whole:
        raise ValueError(f"a group of {group} tokens does not consist of whole blocks on both sides ({whole} do)")
    runs: dict[int, list[range]] = {}
    for run in token_runs(tokens, source.block_size, target.block_size):
        runs.setdefault(run.start // group, []).append(run)
    return [DigestUnit(pair, tuple(part)) for pair in head_pairs(source, target) for part in runs.values()]


def byte_runs(kv: SequenceKV, unit: DigestUnit) -> list[ByteRun]:
    """Where a unit's content lies on a rank of this side that holds its heads, in the order of hashing."""
    layout, heads = kv.layout, unit.pair.heads
    first_head = heads.start % layout.heads_per_rank
    found: list[ByteRun] = []
    for run in unit.runs:
        block, slot = kv.place(run.start)
        length = len(run) * layout.vector_bytes
        for plane in range(layout.planes):
            for head in range(first_head, first_head + len(heads)):
                offset = block * layout.block_bytes + layout.offset(plane, head, slot)
                if found and sum(found[-1]) == offset:
                    found[-1] = (found[-1][0], found[-1][1] + length)
                else:
                    found.append((offset, length))
    return found
