"""Spoiled connections: a fault proxy between prefill and decode worker, or between the router and a worker.

Data connections (KV pages over TCP) take a detour through the proxy (`chaos.detour`); a worker that joins is told the
proxy's address as the router's. Some requests run; the fault begins; others start. Whatever is done to the bytes, every
answer has the tokens of the undisturbed run, KV blocks come back, and all is as before once the fault is over.

Control connections are spoiled inside TLS only: without it they do not leave a machine (`wire.address`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.bench.faults.fleet import Answer, End, Fleet, Violation, ends, longest_wait, until
from diptych.bench.faults.runner import Outcome, outcome
from diptych.bench.server import HOST, free_port
from diptych.chaos import detour
from diptych.chaos.proxy import LASTING, Direction, Fault, FaultProxy, Spoil
from diptych.wire.address import TcpAddress, parse_address

FLAGS = ("--max-batch-tokens", "64", "--max-sequences", "16", "--transport", "tcp")
HANDOFF_BYTES = 9000  # about what the first probe's hand-off sends: 8 KiB of pages, and frames
RUN_SECONDS = 30.0  # until the first answers run
NOTICE_SECONDS = 90.0  # until every answer has ended: the deadline of a first token, and some more
BACK_SECONDS = 45.0  # until a worker has joined again
FAR = "far"


@dataclass(frozen=True, slots=True)
class LinkCase:
    """`link` is "data" or "control". A fault that lasts is over after `seconds`, or (None) when all answers are."""

    link: str
    spoil: Spoil
    tls: bool = False
    seconds: float | None = None

    @property
    def name(self) -> str:
        spoil = self.spoil
        how = f" {spoil.amount:g}" if spoil.amount else ""
        where = f" at byte {spoil.after}" if spoil.fault not in LASTING else ""
        until_when = f" for {self.seconds:g} s" if self.seconds is not None else ""
        direction = str(spoil.direction.name).lower()
        return f"{self.link}{' (tls)' if self.tls else ''}: {spoil.fault}{how} {direction}{where}{until_when}"

    async def run(self, directory: Path) -> Outcome:
        """From start to end."""
        case = _DataLink(self, directory) if self.link == "data" else _ControlLink(self, directory)
        return await outcome(self.name, case.run, case)


def link_cases() -> list[LinkCase]:
    """Every fault, at several places, on both kinds of connection."""
    up, down, both = Direction.UP, Direction.DOWN, Direction.BOTH
    lasting = [
        (Spoil(Fault.BLACK_HOLE, up), None),
        (Spoil(Fault.BLACK_HOLE, down), None),
        (Spoil(Fault.BLACK_HOLE, both), None),
        (Spoil(Fault.PARTITION, both), 3.0),
        (Spoil(Fault.PARTITION, both), 12.0),
        (Spoil(Fault.DELAY, both, amount=0.2), None),
        (Spoil(Fault.THROTTLE, both, amount=4000.0), None),
    ]
    once = [
        Spoil(fault, direction, after=after, seed=after)
        for fault in (Fault.FLIP, Fault.DUPLICATE, Fault.REORDER, Fault.LOSE, Fault.HALF_CLOSE, Fault.RESET)
        for direction, places in ((up, (40, HANDOFF_BYTES // 3, HANDOFF_BYTES // 2)), (down, (20,)))
        for after in places
    ]
    return [
        *(LinkCase("data", spoil, seconds=seconds) for spoil, seconds in lasting),
        *(LinkCase("control", spoil, tls=True, seconds=seconds) for spoil, seconds in lasting),
        *(LinkCase("data", spoil) for spoil in once),
        *(LinkCase("data", spoil, tls=True) for spoil in once if spoil.after == HANDOFF_BYTES // 3),
        *(LinkCase("control", spoil, tls=True) for spoil in once if spoil.after in (20, 40)),
    ]


class _Link:
    """What both kinds have in common."""

    def __init__(self, case: LinkCase, directory: Path) -> None:
        self._case = case
        self._directory = directory
        self.answers: list[Answer] = []
        self._tasks: list[asyncio.Task[Answer]] = []
        self._proxies: list[FaultProxy] = []
        self._epochs: dict[str, int] = {}
        self._lives = 0

    async def _suffer(self, fleet: Fleet) -> None:
        """Requests before, during and after the fault. Raises Violation."""
        self._epochs = await _epochs(fleet)
        try:
            early = self._send(fleet, (50, 120, "split"), (40, 140, "local"))
            await until(lambda: all(len(a.token_ids) > 1 for a in early), "the first answers run", RUN_SECONDS)
            for proxy in self._proxies:
                proxy.inflict(self._case.spoil)
            self._send(fleet, (256, 24, "split"), (70, 30, "auto"), (90, 20, "split"))
            if self._case.seconds is not None:
                await asyncio.sleep(self._case.seconds)
                self._heal()
            _, late = await asyncio.wait(self._tasks, timeout=NOTICE_SECONDS)
            if late:
                raise Violation(f"no end after {NOTICE_SECONDS:g} s: {ends(self.answers)}")
            if any(answer.end is not End.EXACT for answer in self.answers):
                raise Violation(f"answers: {ends(self.answers)}")
            if not any(proxy.struck.is_set() for proxy in self._proxies):
                raise Violation("nothing was spoiled")
        finally:
            self._heal()
            for task in self._tasks:
                task.cancel()
        now = await _epochs(fleet)
        self._lives = sum(now.get(name, 0) != epoch for name, epoch in self._epochs.items())

    def _send(self, fleet: Fleet, *kinds: tuple[int, int, str]) -> list[Answer]:
        answers = [fleet.request(*kind) for kind in kinds]
        self.answers += answers
        self._tasks += [asyncio.create_task(fleet.ask(answer)) for answer in answers]
        return answers

    def _heal(self) -> None:
        for proxy in self._proxies:
            proxy.heal()

    def summary(self) -> str:
        """How the answers ended, the longest wait, and how many workers began a new life."""
        words = [ends(self.answers), f"longest wait {longest_wait(self.answers):.1f} s"]
        return ", ".join([*words, f"{self._lives} new life"] if self._lives else words)


class _DataLink(_Link):
    """One prefill and one decode worker, and proxies in front of both."""

    async def run(self) -> None:
        """Raises Violation."""
        flags = FLAGS
        if self._case.tls:
            flags = (*FLAGS, "--listen", f"{HOST}:0", "--tls", "--key-file", str(self._directory / "key"))
        self._directory.mkdir(parents=True)
        guide = self._directory / "guide"
        fleet = Fleet(self._directory, flags, {detour.VARIABLE: str(guide)})
        async with self._guiding(guide), fleet.running():
            await fleet.start()
            await self._suffer(fleet)
            await fleet.check_next_request()

    @contextlib.asynccontextmanager
    async def _guiding(self, path: Path) -> AsyncIterator[None]:
        """Give detours out."""
        async with contextlib.AsyncExitStack() as stack:

            async def on_worker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                address = parse_address((await reader.readline()).decode().strip())
                if isinstance(address, TcpAddress):
                    proxy = await stack.enter_async_context(FaultProxy(address.host, address.port))
                    self._proxies.append(proxy)
                    writer.write(str(TcpAddress(HOST, proxy.port, address.tls)).encode())
                writer.close()

            server = await asyncio.start_unix_server(on_worker, path)
            try:
                yield
            finally:
                server.close()


class _ControlLink(_Link):
    """A prefill worker of the server's own, and a decode worker that has joined through the proxy."""

    async def run(self) -> None:
        """Raises Violation."""
        port, key = free_port(), str(self._directory / "key")
        where = ("--tls", "--key-file", key)
        flags = (*FLAGS, "--decode", "0", "--listen", f"{HOST}:{port}", *where)
        fleet = Fleet(self._directory, flags, {})
        async with FaultProxy(HOST, port) as proxy, fleet.running():
            self._proxies.append(proxy)
            await fleet.launch()
            await until(lambda: "others may join" in fleet.log(), "it lets others in", RUN_SECONDS)
            joining = ("--role", "decode", "--id", FAR, "--join", f"{HOST}:{proxy.port}", "--rejoin-seconds", "60")
            await fleet.launch_worker(*FLAGS[:-2], *joining, *where)
            await fleet.until_ready()
            await self._suffer(fleet)
            await fleet.until_workers(_has_far, f"{FAR} is back", BACK_SECONDS)
            await fleet.check_next_request()


def _has_far(workers: dict[str, dict[str, Any]]) -> bool:
    return workers.get(FAR, {}).get("state") == "ready"


async def _epochs(fleet: Fleet) -> dict[str, int]:
    return {name: worker["epoch"] for name, worker in (await fleet.workers()).items()}
