"""How fast KV changes hands between two processes, beside what the machine can do at best.

    python -m diptych.bench.handoff_bench --out benchmarks

Writes handoff.json and handoff.md. All rates of a row are measured in the same run, in turns, and are
medians over its rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import secrets
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from diptych.bench.metrics import Fields
from diptych.bench.report import fingerprint, number, table
from diptych.core.blocks import BlockId
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.transfer.digest import unit_digests
from diptych.transfer.sender import NUM_STREAMS
from diptych.transfer.session import KVSource, KVTarget

MIB = 1 << 20
NUM_LAYERS = 8
EQUAL = ("64 KiB pages, scattered", "16 KiB pages, scattered")  # what re-sharded ones are held against
SOCKET_BUFFER_BYTES = 128 << 10  # what iperf3 sends and receives at a time
TIMEOUT = 60


@dataclass(frozen=True, slots=True)
class Shape:
    """How KV lies on both sides. 8 KV heads of 128 in bfloat16, and blocks of 16 tokens, make pages of 64 KiB."""

    source: KVLayout
    target: KVLayout
    scattered: bool  # block tables


def _layout(heads: int = 8, **cut: int) -> KVLayout:
    sizes = {"num_layers": NUM_LAYERS, "head_dim": 128, "block_size": 16, **cut}
    return KVLayout(num_kv_heads=heads, dtype="bfloat16", **sizes)


WIDE, NARROW = _layout(), _layout(heads=2)
SHAPES = {
    "64 KiB pages, consecutive": Shape(WIDE, WIDE, scattered=False),
    EQUAL[0]: Shape(WIDE, WIDE, scattered=True),
    EQUAL[1]: Shape(NARROW, NARROW, scattered=True),
    "TP 4 -> 1, scattered": Shape(_layout(tensor_parallel=4), WIDE, scattered=True),
    "TP 1 -> 4, scattered": Shape(WIDE, _layout(tensor_parallel=4), scattered=True),
    "block 16 -> 32, scattered": Shape(WIDE, _layout(block_size=32), scattered=True),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a shape, and how much moves."""

    mib: int
    shape: str
    rounds: int

    @property
    def layouts(self) -> Shape:
        return SHAPES[self.shape]

    @property
    def num_tokens(self) -> int:
        return self.mib * MIB // self.layouts.source.token_bytes

    def table(self, layout: KVLayout, seed: int) -> list[BlockId]:
        """A block table over all blocks of the memory."""
        blocks = list(range(self.num_tokens // layout.block_size))
        if self.layouts.scattered:
            random.Random(seed).shuffle(blocks)
        return blocks


CASES = tuple(Case(mib, shape, rounds) for mib, rounds in ((1, 61), (16, 31), (256, 9)) for shape in SHAPES)


class WholeTable:
    """Gives the target's blocks out in a fixed order, all of them to each session."""

    def __init__(self, blocks: list[BlockId]) -> None:
        self._blocks = blocks

    def allocate(self, count: int) -> list[BlockId]:
        assert count == len(self._blocks)
        return self._blocks

    def release(self, blocks: Sequence[BlockId]) -> None:
        assert len(blocks) == len(self._blocks)


def run_target(case: Case, key: bytes, directory: str, parent: Connection) -> None:
    """The other process: a target for sessions, and a sink for raw bytes."""
    table = case.table(case.layouts.target, 2)
    with (
        KVTarget(
            case.layouts.target,
            len(table),
            key=key,
            address=f"unix:{directory}/kv",
            pool=WholeTable(table),
        ) as target,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        addresses = target.address, target.receiver.listen("tcp:127.0.0.1:0"), listener.getsockname()[1]
        parent.send(addresses)
        raw, _ = listener.accept()
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with raw:
            while (order := parent.recv()) is not None:
                _obey(order, target, case, raw, parent)


def _obey(order: str, target: KVTarget, case: Case, raw: socket.socket, parent: Connection) -> None:
    match order:
        case "expect":
            parent.send(target.expect("bench", case.num_tokens))
        case "pull":
            target.pull("bench", TIMEOUT)
            target.release("bench")
            parent.send(None)
        case "raw in place":
            parent.send(None)
            for memory in target.memories:
                _take(raw, memory.buffer, len(memory.buffer))
            raw.sendall(b"!")
        case "raw reused":
            parent.send(None)
            _take(raw, memoryview(bytearray(SOCKET_BUFFER_BYTES)), case.mib * MIB)
            raw.sendall(b"!")


def _take(raw: socket.socket, buffer: memoryview, total: int) -> None:
    """Receive `total` bytes into `buffer`, from its start again whenever it is full."""
    done = 0
    while done < total:
        place = done % len(buffer)
        done += raw.recv_into(buffer[place : place + min(MIB, total - done)])


class Bench:
    """The source's process: does the same bytes in every way that is compared."""

    def __init__(self, case: Case, key: bytes, child: Connection, source: KVSource) -> None:
        self._case = case
        self._child = child
        self._source = source
        size, layout = case.mib * MIB, case.layouts.source
        content = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
        self._table = case.table(layout, 1)
        self._copy_from, self._copy_to = content, np.ones(size, dtype=np.uint8)
        parts = np.split(content, layout.world_size)
        ranks = [KVMemory(layout, len(self._table), part.data, rank) for rank, part in enumerate(parts)]
        self._kv = ranks[0] if len(ranks) == 1 else ranks
        self._unit_bytes = layout.block_bytes
        self._unix, self._tcp, port = child.recv()
        self._raw = socket.create_connection(("127.0.0.1", port))
        self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def ways(self) -> dict[str, Callable[[], float]]:
        """What is measured: each takes its turn and returns seconds."""
        return {
            "memcpy": self._memcpy,
            "shm": lambda: self._handoff(self._unix),
            "tcp": lambda: self._handoff(self._tcp),
            "raw in place": lambda: self._stream("raw in place", len(self._copy_from)),
            "raw reused": lambda: self._stream("raw reused", SOCKET_BUFFER_BYTES),
            "digest": self._digest,
        }

    def close(self) -> None:
        self._raw.close()

    def _memcpy(self) -> float:
        start = time.perf_counter()
        np.copyto(self._copy_to, self._copy_from)
        return time.perf_counter() - start

    def _digest(self) -> float:
        """One of the two passes over every page that a hand-off makes."""
        content = memoryview(self._copy_from)  # type: ignore[arg-type]
        ends = range(self._unit_bytes, len(content) + 1, self._unit_bytes)
        start = time.perf_counter()
        unit_digests([content], ends)
        return time.perf_counter() - start

    def _handoff(self, address: str) -> float:
        """From the first push until the target has accepted every page."""
        self._child.send("expect")
        ticket = self._child.recv()
        session = self._source.create_session("bench", self._case.layouts.source, ticket, address)
        start = time.perf_counter()
        session.push(self._kv, blocks=self._table)
        session.close(0)
        session.wait(TIMEOUT)
        seconds = time.perf_counter() - start
        self._child.send("pull")
        self._child.recv()
        return seconds

    def _stream(self, order: str, buffer_bytes: int) -> float:
        """The same number of bytes through a plain TCP socket, until the other end has them."""
        self._child.send(order)
        self._child.recv()
        content = memoryview(self._copy_from)  # type: ignore[arg-type]
        start = time.perf_counter()
        if buffer_bytes >= len(content):
            self._raw.sendall(content)
        else:
            for _ in range(len(content) // buffer_bytes):
                self._raw.sendall(content[:buffer_bytes])
        self._raw.recv(1)
        return time.perf_counter() - start


@contextlib.contextmanager
def bench(case: Case) -> Iterator[Bench]:
    """Both processes, connected."""
    key = secrets.token_bytes(32)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as directory, KVSource(key=key) as source:
        process = context.Process(target=run_target, args=(case, key, directory, theirs))
        process.start()
        theirs.close()
        made = Bench(case, key, ours, source)
        try:
            yield made
        finally:
            made.close()
            source.close()
            ours.send(None)
            process.join()


def measure(case: Case) -> Fields:
    """Median seconds of every way, and rates in GB/s."""
    with bench(case) as made:
        ways = made.ways
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for round_number in range(case.rounds + 1):
            for name in _rotated(list(ways), round_number):
                taken = ways[name]()
                if round_number:  # the first one warms up
                    seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    nbytes = case.mib * MIB
    raw = min(medians["raw in place"], medians["raw reused"])
    return {
        **asdict(case),
        "seconds": medians,
        "gb_per_second": {name: nbytes / value / 1e9 for name, value in medians.items()},
        "shm_of_memcpy": medians["memcpy"] / medians["shm"],
        "tcp_of_raw": raw / medians["tcp"],
        "digest_of_shm": medians["digest"] / medians["shm"],
        "digest_of_tcp": medians["digest"] / medians["tcp"],
    }


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def markdown(machine: Fields, rows: Sequence[Fields]) -> str:
    """The report as one page."""
    header = ["KV", "pages", "rounds", "memcpy", "shm", "shm / memcpy", "raw socket, in place", "raw socket, reused"]
    header += [
        "tcp",
        "tcp / best raw",
        "shm / equal pairs",
        "tcp / equal pairs",
        "digest pass / shm",
        "digest pass / tcp",
    ]
    cells = []
    for row in rows:
        rate = {name: number(value) for name, value in row["gb_per_second"].items()}
        shares = [f"{row[name]:.0%}" for name in ("digest_of_shm", "digest_of_tcp")]
        beside = [_beside_equal_pairs(row, rows, way) for way in ("shm", "tcp")]
        cells.append(
            [f"{row['mib']} MiB", row["shape"], row["rounds"], rate["memcpy"], rate["shm"]]
            + [f"{row['shm_of_memcpy']:.2f}", rate["raw in place"], rate["raw reused"], rate["tcp"]]
            + [f"{row['tcp_of_raw']:.2f}", *beside, *shares]
        )
    return f"""# The hand-off beside memcpy and raw sockets

Made by `{machine["command"]}` on {machine["date"]}, commit {machine["git_commit"]}. {machine["cpu"]},
{machine["cores"]} cores, {machine["memory_gib"]} GiB, {machine["platform"]}, Python {machine["python"]};
load average before the run {machine["load_before"]:.1f}, after it {machine["load_after"]:.1f}.

{table(header, cells)}

Rates in GB/s, medians of rounds in which every column takes its turn. A hand-off goes from one process to
another, as one session of {NUM_LAYERS} layers over a link of {NUM_STREAMS} connections, from the first push
until the target has verified every unit and accepted. memcpy is numpy's `copyto` of as many bytes, within one
process. The raw socket is our own loopback measurement over TCP ({_iperf3()}): once from and into
memory as large as the KV, and once from and into one buffer of {SOCKET_BUFFER_BYTES >> 10} KiB, as iperf3 does it,
which stays in the cache. A digest pass reads every page once, alone; a hand-off makes two, one on each side, beside the
copying.

The last rows of each size re-shard. Beside equal pairs: how fast they are as a share of the same bytes between two
equal layouts with scattered pages, of 64 KiB and of 16 KiB (the pages of each rank of TP 4). Re-sharding
cuts pages of both sizes into ranges of 8 KiB (TP) or 4 KiB (block size).
"""


def _beside_equal_pairs(row: Fields, rows: Sequence[Fields], way: str) -> str:
    """Rates as shares of those between equal layouts."""
    equal = {other["shape"]: other for other in rows if other["mib"] == row["mib"]}
    if SHAPES[row["shape"]].source == SHAPES[row["shape"]].target or not set(EQUAL) <= equal.keys():
        return ""
    return ", ".join(f"{row['gb_per_second'][way] / equal[name]['gb_per_second'][way]:.2f}" for name in EQUAL)


def _iperf3() -> str:
    return "iperf3 is installed, but was not used" if shutil.which("iperf3") else "iperf3 is not installed"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="directory for handoff.json and .md")
    parser.add_argument("--max-mib", type=int, default=256, help="leave larger ones out")
    options: Any = parser.parse_args(arguments)
    machine = {**fingerprint("make bench-handoff"), "load_before": os.getloadavg()[0]}
    rows = [measure(case) for case in CASES if case.mib <= options.max_mib]
    machine["load_after"] = os.getloadavg()[0]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "handoff.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    report = markdown(machine, rows)
    (options.out / "handoff.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
