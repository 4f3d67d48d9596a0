"""Which processes belong to a server, and what they use: read from Linux's /proc (proc(5))."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """Part of /proc/<pid>/stat. `start` (ticks since boot) tells a process from a later one of the same id."""

    pid: int
    parent: int
    state: str
    cpu_seconds: float  # user and system, all threads
    start: int


def parse_stat(line: str) -> ProcessStat:
    """Parse the line; the command in its second field may hold blanks and parentheses."""
    pid, _, rest = line.partition(" (")
    fields = rest.rpartition(") ")[2].split()  # the first of these is the third field, counted from one
    ticks = int(fields[11]) + int(fields[12])
    return ProcessStat(int(pid), int(fields[1]), fields[0], ticks / TICKS_PER_SECOND, int(fields[19]))


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds: memory in MB (pages that it shares, by its share: PSS of proc(5)), descriptors, threads."""

    megabytes: float
    descriptors: int
    threads: int


def footprint(pid: int) -> Footprint | None:
    """None if it is gone."""
    directory = PROC / str(pid)
    try:
        rollup = (directory / "smaps_rollup").read_text()
        descriptors, threads = (len(os.listdir(directory / name)) for name in ("fd", "task"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    kilobytes = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return Footprint(kilobytes / 1000, descriptors, threads)


def tree(root: int) -> dict[int, ProcessStat]:
    """The process `root` and all its living descendants, by id; empty if it is gone."""
    stats = _all_stats()
    found: dict[int, ProcessStat] = {}
    frontier = {root} & stats.keys()
    while frontier:
        found |= {pid: stats[pid] for pid in frontier}
        frontier = {pid for pid, stat in stats.items() if stat.parent in frontier and pid not in found}
    return found


def still_alive(processes: dict[int, ProcessStat]) -> list[int]:
    """Ids of those that still run. A zombie does not: it only waits for its parent to notice."""
    stats = _all_stats()
    return [pid for pid, stat in processes.items() if pid in stats and stats[pid].start == stat.start]


def _all_stats() -> dict[int, ProcessStat]:
    stats: dict[int, ProcessStat] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                stat = parse_stat((entry / "stat").read_text(errors="replace"))
            except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
                continue
            if stat.state not in "ZX":
                stats[stat.pid] = stat
    return stats
