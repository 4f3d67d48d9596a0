"""Which worker gets which cores. Two threads spinning on one core cost ten times, so every worker is pinned,
and each of its ranks has as many intra-op threads as there are cores for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from diptych.core.settings import CpuSettings


def place(ranks: Sequence[int], cores: Sequence[int]) -> list[CpuSettings]:
    """Cut the cores evenly among ranks, of which worker i has `ranks[i]`; with fewer cores than ranks, cores
    are shared in turn.

    Otherwise each core is given out once; what does not divide evenly stays with the first ranks.
    """
    shares = _shares(sum(ranks), cores)
    placed: list[CpuSettings] = []
    for count in ranks:
        mine = [next(shares) for _ in range(count)]
        together = tuple(sorted({core for share in mine for core in share}))
        placed.append(CpuSettings(cores=together, threads=min(map(len, mine))))
    return placed


def _shares(number: int, cores: Sequence[int]) -> Iterator[Sequence[int]]:
    """The cores of each of `number` ranks."""
    if number > len(cores):
        yield from ((cores[index % len(cores)],) for index in range(number))
    elif number:
        share, extra = divmod(len(cores), number)
        starts = [index * share + min(index, extra) for index in range(number + 1)]
        yield from (cores[start:end] for start, end in pairwise(starts))
