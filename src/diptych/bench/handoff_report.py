"""The table of `bench.handoff_bench`."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.bench.handoff_cases import EQUAL, NUM_LAYERS, SHAPES
from diptych.bench.metrics import Fields
from diptych.bench.report import number, table
from diptych.transfer.sender import NUM_STREAMS


def markdown(machine: Fields, rows: Sequence[Fields]) -> str:
    """The report as one page."""
    return f"""# The hand-off beside memcpy and raw sockets

Made by `{machine["command"]}` on {machine["date"]}, commit {machine["git_commit"]}. {machine["cpu"]},
{machine["cores"]} cores, {machine["memory_gib"]} GiB, {machine["platform"]}, Python {machine["python"]};
load average before the run {machine["load_before"]:.1f}, after it {machine["load_after"]:.1f}.

Rates in GB/s, medians of rounds in which every column takes its turn. A hand-off goes from one process to
another, as one session of {NUM_LAYERS} layers over a link of {NUM_STREAMS} connections, from the first push
until the target has verified every unit and accepted.

## Shared memory

{table(*_shared_memory(rows))}

- **memcpy** is numpy's `copyto` of as many bytes, within one process.
- **page copies** are the same bytes in the same pages (or ranges of them, where pages are cut), copied one by one into
  the target's memory, and nothing else: what scattered pages alone cost beside one long copy.
- **ceiling**: the same page copies, each unit hashed after its copy in one process and again in the other one, by bare
  loops, frames of 1 MiB announced over a socket pair; no plan, no protocol, one thread on each side.
- **CPU in memcpys, in ceilings** is the processor time of both sides together as a multiple of that memcpy's, and of
  both processes of the bare loops, which depends less on what else runs on the machine.
- **digest pass**: every page read once, alone; a hand-off makes two such passes, one on each side, beside the copying.

## TCP over loopback

{table(*_tcp(rows))}

The raw socket is our own measurement: once from and into memory as large as the KV, and once from and into one buffer
of 128 KiB, as iperf3 does it, which stays in the cache. iperf3 {_iperf3(rows)}.

## Re-sharded pairs

{table(*_resharded(rows))}

How fast they are as a share of the same bytes between two equal layouts with scattered pages, of 64 KiB and of 16 KiB
(the pages of each rank of TP 4). Re-sharding cuts pages of both sizes into ranges of 8 KiB (TP) or 4 KiB (block size).
"""


def _about(row: Fields) -> list[str]:
    return [f"{row['mib']} MiB", row["shape"]]


def _rates(row: Fields, *names: str) -> list[str]:
    return [number(row["gb_per_second"][name]) if name in row["gb_per_second"] else "" for name in names]


def _shared_memory(rows: Sequence[Fields]) -> tuple[list[str], list[list[str]]]:
    header = ["KV", "pages", "rounds", "memcpy", "page copies", "ceiling", "shm"]
    header += [
        "shm / memcpy",
        "shm / page copies",
        "shm / ceiling",
        "CPU in memcpys",
        "CPU in ceilings",
        "digest pass / shm",
    ]
    cells = []
    for row in rows:
        shares = [f"{row[name]:.2f}" for name in ("shm_of_memcpy", "shm_of_page_copies", "shm_of_ceiling")]
        costs = [f"{row['shm_cpu_in_memcpys']:.1f}", f"{row['shm_cpu_in_ceilings']:.2f}", f"{row['digest_of_shm']:.0%}"]
        rates = _rates(row, "memcpy", "page copies", "ceiling", "shm")
        cells.append([*_about(row), str(row["rounds"]), *rates, *shares, *costs])
    return header, cells


def _tcp(rows: Sequence[Fields]) -> tuple[list[str], list[list[str]]]:
    header = ["KV", "pages", "raw, in place", "raw, reused", "iperf3", "tcp", "tcp / best raw", "best raw"]
    header += ["digest pass / tcp"]
    cells = [
        [
            *_about(row),
            *_rates(row, "raw in place", "raw reused", "iperf3", "tcp"),
            f"{row['tcp_of_raw']:.2f}",
            row["best_raw"],
            f"{row['digest_of_tcp']:.0%}",
        ]
        for row in rows
    ]
    return header, cells


def _resharded(rows: Sequence[Fields]) -> tuple[list[str], list[list[str]]]:
    header = ["KV", "pages", *(f"{way} / {name}" for way in ("shm", "tcp") for name in EQUAL)]
    equal = {(row["mib"], row["shape"]): row for row in rows}
    cells = []
    for row in rows:
        beside = [equal.get((row["mib"], name)) for name in EQUAL]
        if SHAPES[row["shape"]].source != SHAPES[row["shape"]].target and None not in beside:
            rates = [
                row["gb_per_second"][way] / other["gb_per_second"][way]
                for way in ("shm", "tcp")
                for other in beside
                if other is not None
            ]
            cells.append([*_about(row), *(f"{rate:.2f}" for rate in rates)])
    return header, cells


def _iperf3(rows: Sequence[Fields]) -> str:
    if any("iperf3" in row["gb_per_second"] for row in rows):
        return "sends one stream for a second, after each row's rounds, as it is installed"
    return "is not installed"
