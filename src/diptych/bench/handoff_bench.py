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
import secrets
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from diptych.bench.handoff_cases import CASES, MIB, Case
from diptych.bench.handoff_ceiling import bare_frames, copy_all, hash_frame
from diptych.bench.handoff_report import markdown
from diptych.bench.loopback import iperf3
from diptych.bench.metrics import Fields
from diptych.bench.report import fingerprint
from diptych.core.blocks import BlockId
from diptych.core.kv_layout import KVMemory
from diptych.transfer.digest import unit_digests
from diptych.transfer.memory import map_memory
from diptych.transfer.session import KVSource, KVTarget

SOCKET_BUFFER_BYTES = 128 << 10  # what iperf3 sends and receives at a time
IPERF3_SECONDS = 1
TIMEOUT = 60


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
    """The other process: a target for sessions, the far end of the bare loops, and a sink for raw bytes."""
    table = list(case.target.blocks)
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
        for segment in target._segments:
            reduction.send_handle(parent, segment.descriptor, os.getppid())
        raw, _ = listener.accept()
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with raw:
            while (order := parent.recv()) is not None:
                _obey(order, target, case, raw, parent)


def _obey(order: str, target: KVTarget, case: Case, raw: socket.socket, parent: Connection) -> None:
    match order:
        case "expect":
            parent.send((target.expect("bench", case.num_tokens), time.process_time()))
        case "pull":
            target.pull("bench", TIMEOUT)
            target.release("bench")
            parent.send(time.process_time())
        case "ceiling":
            frames = bare_frames(case)
            parent.send(time.process_time())
            while number := parent.recv_bytes():
                hash_frame(frames[int.from_bytes(number, "big")], target.memories)
            parent.send_bytes(b"!")
            parent.send(time.process_time())
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
        self.cpu_seconds: dict[str, list[float]] = {"memcpy": [], "ceiling": [], "shm": [], "tcp": []}
        size, layout = case.mib * MIB, case.layouts.source
        self._frames = bare_frames(case)
        content = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
        self._table = list(case.source.blocks)
        self._copy_from, self._copy_to = content, np.ones(size, dtype=np.uint8)
        parts = np.split(content, layout.world_size)
        ranks = [KVMemory(layout, len(self._table), part.data, rank) for rank, part in enumerate(parts)]
        self._ranks = ranks
        self._kv = ranks[0] if len(ranks) == 1 else ranks
        self._unit_bytes = layout.block_bytes
        self._unix, self._tcp, port = child.recv()
        theirs, num_blocks = case.layouts.target, len(case.target.blocks)
        self._theirs = [
            map_memory(reduction.recv_handle(child), theirs, num_blocks, rank) for rank in range(theirs.world_size)
        ]
        self._raw = socket.create_connection(("127.0.0.1", port))
        self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def ways(self) -> dict[str, Callable[[], float]]:
        """What is measured: each takes its turn and returns seconds."""
        return {
            "memcpy": self._memcpy,
            "page copies": self._copy_pages,
            "ceiling": self._copy_and_hash,
            "shm": lambda: self._handoff("shm", self._unix),
            "tcp": lambda: self._handoff("tcp", self._tcp),
            "raw in place": lambda: self._stream("raw in place", len(self._copy_from)),
            "raw reused": lambda: self._stream("raw reused", SOCKET_BUFFER_BYTES),
            "digest": self._digest,
        }

    def close(self) -> None:
        self._raw.close()

    def _memcpy(self) -> float:
        start, cpu = time.perf_counter(), time.process_time()
        np.copyto(self._copy_to, self._copy_from)
        self.cpu_seconds["memcpy"].append(time.process_time() - cpu)
        return time.perf_counter() - start

    def _copy_pages(self) -> float:
        """Range by range into the target's memory, as a hand-off has to."""
        start = time.perf_counter()
        copy_all(self._frames, self._ranks, self._theirs)
        return time.perf_counter() - start

    def _copy_and_hash(self) -> float:
        """Digests on both sides, too, and nothing else."""
        self._child.send("ceiling")
        their_cpu = self._child.recv()
        start, our_cpu = time.perf_counter(), time.process_time()
        announce = [number.to_bytes(4, "big") for number in range(len(self._frames))]
        copy_all(
            self._frames, self._ranks, self._theirs, announce=lambda number: self._child.send_bytes(announce[number])
        )
        self._child.send_bytes(b"")
        self._child.recv_bytes()
        seconds, our_cpu = time.perf_counter() - start, time.process_time() - our_cpu
        self.cpu_seconds["ceiling"].append(our_cpu + self._child.recv() - their_cpu)
        return seconds

    def _digest(self) -> float:
        """One of the two passes over every page that a hand-off makes."""
        content = memoryview(self._copy_from)  # type: ignore[arg-type]
        ends = range(self._unit_bytes, len(content) + 1, self._unit_bytes)
        start = time.perf_counter()
        unit_digests([content], ends)
        return time.perf_counter() - start

    def _handoff(self, transport: str, address: str) -> float:
        """From the first push until the target has accepted every page. Notes the processor time of both sides."""
        self._child.send("expect")
        ticket, their_cpu = self._child.recv()
        session = self._source.create_session("bench", self._case.layouts.source, ticket, address)
        start, our_cpu = time.perf_counter(), time.process_time()
        session.push(self._kv, blocks=self._table)
        session.close(0)
        session.wait(TIMEOUT)
        seconds, our_cpu = time.perf_counter() - start, time.process_time() - our_cpu
        self._child.send("pull")
        self.cpu_seconds[transport].append(our_cpu + self._child.recv() - their_cpu)
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
        cpu = {name: statistics.median(values[1:]) for name, values in made.cpu_seconds.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: case.mib * MIB / value / 1e9 for name, value in medians.items()}
    raw = {name: rates[name] for name in ("raw in place", "raw reused")}
    if (theirs := iperf3(IPERF3_SECONDS)) is not None:
        raw["iperf3"] = rates["iperf3"] = theirs
    best = max(raw, key=lambda name: raw[name])
    return {
        **asdict(case),
        "seconds": medians,
        "gb_per_second": rates,
        "shm_of_memcpy": medians["memcpy"] / medians["shm"],
        "shm_of_page_copies": medians["page copies"] / medians["shm"],
        "shm_of_ceiling": medians["ceiling"] / medians["shm"],
        "best_raw": best,
        "tcp_of_raw": rates["tcp"] / raw[best],
        "digest_of_shm": medians["digest"] / medians["shm"],
        "digest_of_tcp": medians["digest"] / medians["tcp"],
        "cpu_seconds": cpu,
        "shm_cpu_in_memcpys": cpu["shm"] / cpu["memcpy"],
        "shm_cpu_in_ceilings": cpu["shm"] / cpu["ceiling"],
    }


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


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
