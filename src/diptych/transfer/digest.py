"""Digests of pages: XXH3-64, 8 bytes each, over the units of `policy.digest_units`.

Not a MAC: channels are authenticated, this finds accidents (a stale, torn or foreign page). XXH3 reads
tens of GB/s out of the CPU's caches, so that checking costs little beside computing the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import xxhash

DIGEST_BYTES = 8

_digest: Callable[[Any], bytes] = xxhash.xxh3_64_digest


def span_digests(layer: memoryview, spans: Sequence[tuple[int, int]]) -> bytes:
    """The digests of units that lie in one run each: (from, to) of every one."""
    return b"".join([_digest(layer[start:stop]) for start, stop in spans])


def unit_digests(content: Sequence[memoryview], ends: Sequence[int]) -> bytes:
    """The digests of units that lie one after the other in the buffers of `content`, as one stream; `ends` says
    where each of them ends there."""
    if len(content) > 1:
        return b"".join(_digests_across(content, ends))
    [whole] = content
    return b"".join([_digest(whole[start:end]) for start, end in zip((0, *ends), ends, strict=False)])


def _digests_across(content: Sequence[memoryview], ends: Sequence[int]) -> Iterator[bytes]:
    """The same for units that may begin in one buffer and end in another."""
    buffers = iter(content)
    rest, position = next(buffers), 0
    for end in ends:
        size, position = end - position, end
        if len(rest) >= size:  # it lies in one buffer
            yield _digest(rest[:size])
        else:
            unit = xxhash.xxh3_64(rest)
            size -= len(rest)
            rest = next(buffers)
            while len(rest) < size:
                unit.update(rest)
                size -= len(rest)
                rest = next(buffers)
            unit.update(rest[:size])
            yield unit.digest()
        rest = rest[size:] or next(buffers, rest)
