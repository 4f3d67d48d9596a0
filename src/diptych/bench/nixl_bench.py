"""NIXL beside our own transports, memcpy and raw sockets, and what each costs in CPU time.

    python -m diptych.bench.nixl_bench --out benchmarks

Writes nixl.json and nixl.md. Needs NIXL (`pip install 'diptych[nixl]'`). UCX is left to choose between processes
of one machine ("all"), and told to use TCP ("tcp,self"); each is measured by a pair of processes of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import random
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

from diptych.bench.loopback import iperf3
from diptych.bench.metrics import Fields
from diptych.bench.report import fingerprint, number, table
from diptych.core.events import PushAccepted
from diptych.core.fleet import KVEndpoint
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.request import SampledToken
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import plan_transfer
from diptych.transfer import nixl
from diptych.transfer.memory import SharedMemory
from diptych.transfer.receiver import KVReceiver, Target
from diptych.transfer.sender import Identity, PushLink

MIB = 1 << 20
KEY = bytes(32)
TIMEOUT = 120
IDLE_SECONDS = 3.0
# 64 KiB in a block of a layer: eight KV heads of 128 in bfloat16
LAYOUT = KVLayout(num_layers=8, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_size=16)
HANDOFFS = ("shm", "tcp", "nixl")


@dataclass(frozen=True, slots=True)
class Case:
    """One row: `mib` of KV in scattered blocks, and what UCX may use."""

    ucx: str
    mib: int
    rounds: int

    @property
    def num_blocks(self) -> int:
        return self.mib * MIB // (LAYOUT.num_layers * LAYOUT.block_bytes)

    def claims(self, number: int) -> TicketClaims:
        return TicketClaims(
            request_id=str(number),
            worker_id="target",
            epoch=1,
            blocks=tuple(random.Random(2).sample(range(self.num_blocks), self.num_blocks)),
            first_block=0,
            num_tokens=self.num_blocks * LAYOUT.block_size,
            layout=LAYOUT,
            model_digest="",
            salt="",
            nonce=number.to_bytes(16, "big"),
        )


CASES = tuple(Case(ucx, mib, rounds) for ucx in ("all", "tcp,self") for mib, rounds in ((1, 31), (16, 15), (256, 5)))


def run_target(case: Case, directory: str, parent: Connection) -> None:
    """The other process: it takes hand-offs in, has a NIXL agent of its own, and a sink for raw bytes."""
    _choose(case.ucx)
    segment = SharedMemory(case.mib * MIB)
    memory = KVMemory(LAYOUT, case.num_blocks, segment.buffer)
    about = Target(key=KEY, epoch=1, memories=(memory,), model_digest="", descriptors=(segment.descriptor,), nixl=True)
    receiver = KVReceiver(about, lambda event: None)
    over_tcp = receiver.listen("tcp:127.0.0.1:0")
    agent = nixl.NixlTarget(b"alone", [memory])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        addresses = {"shm": receiver.listen(f"unix:{directory}/kv"), "tcp": over_tcp, "nixl": over_tcp}
        parent.send((addresses, agent.welcome.metadata, agent.welcome.bases[0], listener.getsockname()[1]))
        raw, _ = listener.accept()
    with raw:
        while (order := parent.recv()) is not None:
            if isinstance(order, TicketClaims):
                receiver.expect(order)
            elif order == "raw":
                _take(raw, segment.buffer)
            parent.send(time.process_time())
    receiver.close()
    agent.close()


def _choose(ucx: str) -> None:
    """Before NIXL is loaded."""
    os.environ["UCX_TLS"] = ucx
    nixl.stay_on_this_host()


def _take(raw: socket.socket, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        done += raw.recv_into(memory[done : done + MIB])


class Bench:
    """The source's process: moves the same bytes in every way that is compared."""

    def __init__(self, case: Case, child: Connection) -> None:
        self._case = case
        self._child = child
        self._number = 0
        self._content = np.random.default_rng(1).integers(0, 256, case.mib * MIB, dtype=np.uint8)
        self._copy = np.ones_like(self._content)
        memory = KVMemory(LAYOUT, case.num_blocks, self._content.data)
        addresses, metadata, self._base, port = child.recv()
        self._raw = socket.create_connection(("127.0.0.1", port))
        self._accepted: queue.SimpleQueue[Any] = queue.SimpleQueue()
        identity = Identity(key=KEY, worker_id="source", model_digest="")
        self._links = {
            name: PushLink(
                "target", KVEndpoint(transport=name, address=address), identity, [memory], self._accepted.put
            )
            for name, address in addresses.items()
        }
        self._agent = nixl.Agent("source-alone")
        self._agent.register(self._content.data)
        self._agent.meet(metadata)

    @property
    def ways(self) -> dict[str, Callable[[], None]]:
        """What is measured, one after the other."""
        handoffs = {name: lambda name=name: self._hand_over(name) for name in HANDOFFS}
        return {"memcpy": self._memcpy, **handoffs, "nixl alone": self._write, "raw": self._send}

    def seconds(self, way: Callable[[], None]) -> tuple[float, float]:
        """(wall, CPU of both processes) of one turn."""
        cpu = self._cpu()
        begin = time.perf_counter()
        way()
        wall = time.perf_counter() - begin
        return wall, self._cpu() - cpu

    def idle(self) -> float:
        """CPU of both processes, with all connections open and nothing to do, as a share of one core."""
        cpu = self._cpu()
        time.sleep(IDLE_SECONDS)
        return (self._cpu() - cpu) / IDLE_SECONDS

    def close(self) -> None:
        for link in self._links.values():
            link.end()
        self._agent.close()
        self._raw.close()

    def _cpu(self) -> float:
        return time.process_time() + float(self._ask("cpu"))

    def _ask(self, order: object) -> Any:
        self._child.send(order)
        return self._child.recv()

    def _memcpy(self) -> None:
        np.copyto(self._copy, self._content)

    def _hand_over(self, transport: str) -> None:
        """One request: from the ticket until the target has accepted every page."""
        self._number += 1
        claims, link = self._case.claims(self._number), self._links[transport]
        blocks = range(self._case.num_blocks)
        plan = plan_transfer(LAYOUT, LAYOUT, blocks, claims.blocks, first_block=0)
        self._ask(claims)
        link.push(claims.request_id, claims, plan, range(LAYOUT.num_layers))
        link.close_handoff(claims.request_id, claims, SampledToken(0))
        event = self._accepted.get(timeout=TIMEOUT)
        if not isinstance(event, PushAccepted):
            raise RuntimeError(f"the hand-off over {transport} failed: {event}")

    def _write(self) -> None:
        """NIXL by itself: one transfer of pages, no digests."""
        pages = np.arange(0, len(self._content), LAYOUT.block_bytes)
        sizes = np.full_like(pages, LAYOUT.block_bytes)
        ours = nixl.address_of(self._content.data) + pages, sizes
        self._agent.write(*nixl.descriptors(ours, (self._base + pages, sizes)))

    def _send(self) -> None:
        self._child.send("raw")
        self._raw.sendall(self._content)
        self._child.recv()


@contextlib.contextmanager
def bench(case: Case) -> Iterator[Bench]:
    """Both processes, connected."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as directory:
        process = context.Process(target=run_target, args=(case, directory, theirs))
        process.start()
        theirs.close()
        made = Bench(case, ours)
        try:
            yield made
        finally:
            made.close()
            ours.send(None)
            process.join()


def measure(case: Case, results: Connection) -> None:
    """Send medians of every way: seconds of wall and of CPU time, and GB/s. A process of its own."""
    _choose(case.ucx)
    with bench(case) as made:
        ways = made.ways
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for round_number in range(case.rounds + 1):
            for name, way in ways.items():
                seconds = made.seconds(way)
                if round_number:  # the first one warms up
                    taken[name].append(seconds)
        idle = made.idle()
    wall = {name: statistics.median(pair[0] for pair in values) for name, values in taken.items()}
    cpu = {name: statistics.mean(pair[1] for pair in values) for name, values in taken.items()}
    nbytes = case.mib * MIB
    results.send(
        {
            **asdict(case),
            "gb_per_second": {name: nbytes / value / 1e9 for name, value in wall.items()},
            "cpu_seconds_per_gb": {name: value / nbytes * 1e9 for name, value in cpu.items()},
            "idle_cpu": idle,
        }
    )


def markdown(machine: Fields, rows: Sequence[Fields], reference: float | None) -> str:
    """The report as one page."""
    names = ["memcpy", "shm", "nixl", "nixl alone", "tcp", "raw"]
    header = ["UCX_TLS", "KV", "rounds", *names, "idle CPU of both, % of a core"]
    costs = ["UCX_TLS", "KV", *names]
    cells, cost_cells = [], []
    for row in rows:
        about = [row["ucx"], f"{row['mib']} MiB"]
        rates = [number(row["gb_per_second"][name], 2) for name in names]
        cells.append([*about, row["rounds"], *rates, number(100 * row["idle_cpu"], 2)])
        cost_cells.append([*about, *(number(row["cpu_seconds_per_gb"][name], 2) for name in names)])
    loopback = "iperf3 is not installed" if reference is None else f"iperf3, one stream: {reference:.2f} GB/s"
    return f"""# NIXL beside our own transports

Made by `{machine["command"]}` on {machine["date"]}, commit {machine["git_commit"]}. {machine["cpu"]},
{machine["cores"]} cores, {machine["memory_gib"]} GiB, {machine["platform"]}, Python {machine["python"]};
load average before the run {machine["load_before"]:.1f}. {loopback}.

## GB/s

{table(header, cells)}

Medians of rounds in which every column takes its turn, between two processes; pages of 64 KiB, scattered at the target.
shm, tcp and nixl are whole hand-offs over two streams, from the plan until the target has verified every page. nixl
alone is one NIXL transfer, without digests or messages; raw a TCP socket from memory into memory; memcpy happens
within one process. With UCX_TLS=all, UCX copies from process to process (CMA); with tcp,self
it has to use loopback TCP.

## CPU seconds per GB, of both processes together

{table(costs, cost_cells)}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="directory for nixl.json and .md")
    parser.add_argument("--max-mib", type=int, default=256, help="leave larger ones out")
    options = parser.parse_args(arguments)
    nixl.load()
    machine = {**fingerprint("python -m diptych.bench.nixl_bench"), "load_before": os.getloadavg()[0]}
    reference = iperf3()
    rows = [_in_a_process(case) for case in CASES if case.mib <= options.max_mib]
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "iperf3_gb_per_second": reference, "rows": rows}
    (options.out / "nixl.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    report = markdown(machine, rows, reference)
    (options.out / "nixl.md").write_text(report, encoding="utf-8")
    print(report)


def _in_a_process(case: Case) -> Fields:
    """Since UCX reads what it may use once, when a process begins with it."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(case, theirs))
    process.start()
    theirs.close()
    try:
        result: Fields = ours.recv()
    finally:
        process.join()
    return result


if __name__ == "__main__":
    main()
