"""Which worker gets which cores. Two workers' threads spinning on one core cost ten times, so every
worker is pinned, and has as many intra-op threads as cores of its own."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.core.settings import CpuSettings


def place(num_workers: int, cores: Sequence[int]) -> list[CpuSettings]:
    """Cut the cores evenly, worker by worker; with fewer cores than workers, cores are shared.

    Each core is given out once;
    what does not divide evenly stays with the first workers.
    """
    if num_workers == 0:
        return []
    if num_workers > len(cores):
        return [CpuSettings(cores=(cores[index % len(cores)],), threads=1) for index in range(num_workers)]
    share, extra = divmod(len(cores), num_workers)
    placed: list[CpuSettings] = []
    start = 0
    for index in range(num_workers):
        end = start + share + (index < extra)
        placed.append(CpuSettings(cores=tuple(cores[start:end]), threads=end - start))
        start = end
    return placed
