"""The kill matrix: a signal to one process of a serving fleet, in every phase of a request.

Each cell is a fleet of its own (`diptych serve --engine scripted`, one prefill and one decode worker). Some requests
are running; another begins; and when a process reaches the named phase it is held there (`chaos.failpoints`) until
the victim has got its signal. Then everything must come right:

- a worker as victim: every answer has the tokens of the undisturbed run, the worker comes back in a new life;
- the router as victim: every answer is exact or ends with an error or a broken connection (after TERM: none that had
  begun), its processes end, and after a new start the retried requests are exact; a frozen router goes on;
- always: ready again within a bound, no KV block in use when all is done, nothing left after the end.

STOP freezes a worker for good (its silence is noticed, and it is killed), and the router for a while.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.bench import processes
from diptych.bench.faults.fleet import Answer, End, Fleet, Violation, ends, longest_wait, until
from diptych.bench.faults.runner import Outcome, outcome
from diptych.chaos import failpoints

LAYERS, CHUNKS = 2, 4  # of the scripted model; of the probe's prompt
CHUNK_TOKENS = 64
FLAGS = ("--max-batch-tokens", str(CHUNK_TOKENS), "--max-sequences", "16")

PHASE_SECONDS = 30.0  # until the phase is reached
RECOVERY_SECONDS = 60.0  # until the victim is back, on a busy machine
FROZEN_SECONDS = 8.0  # a router that is stopped goes on after this: longer than it waits for workers, not than they do

VICTIMS = ("prefill", "decode", "router")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Phase:
    """A process of `role` is at its hit number `hit` of a failpoint, counted from when the probe is sent. Without
    a failpoint: nothing is going on. Role "victim": the victim has been told to end, and has begun to."""

    name: str
    role: str = ""
    failpoint: str = ""
    hit: int = 1


PHASES = (
    Phase("idle"),
    Phase("admitted", "router", "request.admitted"),
    Phase("ticket minted", "decode", "ticket.minted"),
    Phase("queued", "prefill", "request.queued"),
    Phase("prefill chunk 1 of 4 started", "prefill", "step.started", 1),
    Phase("prefill chunk 2 of 4 finished", "prefill", "step.finished", 2),
    Phase("chunk 1 sent", "prefill", "push.layer_sent", LAYERS),
    Phase("mid transfer", "prefill", "push.layer_sent", LAYERS * CHUNKS // 2 + 1),
    Phase("last chunk sent", "prefill", "push.layer_sent", LAYERS * CHUNKS),
    Phase("first token made", "prefill", "first_token.made"),
    Phase("first token sent", "prefill", "first_token.sent"),
    Phase("close sent", "prefill", "push.close_sent"),
    Phase("verified, not accepted", "decode", "receive.complete"),
    Phase("ack lost", "prefill", "push.accepted"),
    Phase("mid decode", "decode", "step.finished", 12),
    Phase("last token made", "decode", "request.over"),
    Phase("last token before flush", "router", "stream.ending"),
    Phase("drain", "victim", "draining"),
)
DRAINING = ("worker.draining", "router.draining")


@dataclass(frozen=True, slots=True)
class Cell:
    """`victim` gets `signum` in `phase`."""

    phase: Phase
    victim: str
    signum: signal.Signals
    transport: str = "auto"

    @property
    def name(self) -> str:
        transport = "" if self.transport == "auto" else f" ({self.transport})"
        return f"{self.phase.name}{transport} / {self.victim} / {self.signum.name.removeprefix('SIG')}"

    async def run(self, directory: Path) -> Outcome:
        """From start to end."""
        names = [self.phase.failpoint] if self.phase.role != "victim" else list(DRAINING)
        specs = (f"*/{name}=meet:{directory}/meet@1+" for name in names if name)
        flags = (*FLAGS, "--transport", self.transport)
        case = _Case(self, Fleet(directory, flags, {failpoints.VARIABLE: ";".join(specs)}))
        return await outcome(self.name, case.run, case)


def phase_cells() -> list[Cell]:
    """Every phase, every victim, every signal."""
    return [Cell(*combination) for combination in itertools.product(PHASES, VICTIMS, SIGNALS)]


def boundary_cells() -> list[Cell]:
    """Death of either side of a hand-off at each boundary between two layers, with shared memory and TCP."""
    cells = []
    for transport, number in itertools.product(("shm", "tcp"), range(1, LAYERS * CHUNKS + 1)):
        sent = Phase(f"layer {number} of {LAYERS * CHUNKS} sent", "prefill", "push.layer_sent", number)
        taken = Phase(f"layer {number} of {LAYERS * CHUNKS} verified", "decode", "receive.pages_verified", number)
        cells.append(Cell(sent, "prefill", signal.SIGKILL, transport))
        cells.append(Cell(taken, "decode", signal.SIGKILL, transport))
    return cells


def grid(outcomes: Iterable[Outcome]) -> str:
    """The matrix for people: a line for each phase (of which there are outcomes), a column for each victim and signal;
    the longest wait of a client in seconds, or that something was violated."""
    by_name = {outcome.name: outcome for outcome in outcomes}
    columns = list(itertools.product(VICTIMS, SIGNALS))
    width = max(len(phase.name) for phase in PHASES)
    titles = (f"{victim[:7]} {signum.name.removeprefix('SIG')}" for victim, signum in columns)
    lines = [" ".join([" " * width, *(f"{title:>13}" for title in titles)])]
    for phase in PHASES:
        found = [by_name.get(Cell(phase, *column).name) for column in columns]
        if any(found):
            lines.append(" ".join([f"{phase.name:<{width}}", *(f"{_in_grid(outcome):>13}" for outcome in found)]))
    return "\n".join(lines)


def _in_grid(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    return "VIOLATED" if outcome.violation else f"ok {outcome.longest_wait:.1f} s"


class _Case:
    """One cell under way."""

    def __init__(self, cell: Cell, fleet: Fleet) -> None:
        self._cell = cell
        self._fleet = fleet
        self.answers: list[Answer] = []
        self._tasks: list[asyncio.Task[Answer]] = []
        self._victim_pid = 0
        self._epochs: dict[str, int] = {}
        self._hurt_at: float | None = None
        self._back_after: float | None = None

    async def run(self) -> None:
        """Raises Violation."""
        async with self._fleet.running():
            await self._fleet.start()
            await self._run()

    async def _run(self) -> None:
        workers = await self._fleet.workers()
        self._epochs = {name: worker["epoch"] for name, worker in workers.items()}
        self._victim_pid = self._fleet.pid if self._cell.victim == "router" else workers[self._worker]["pid"]
        try:
            await self._reach_phase()
            await (self._after_router() if self._cell.victim == "router" else self._after_worker())
        finally:
            for task in self._tasks:
                task.cancel()
        await self._fleet.check_next_request()

    @property
    def _worker(self) -> str:
        return f"{self._cell.victim}-0"

    async def _reach_phase(self) -> None:
        phase = self._cell.phase
        if not phase.failpoint:
            self._hurt()
            self._send((100, 20, "split"), (60, 20, "local"))
            return
        early = self._send((50, 120, "split"), (40, 140, "local"))
        await until(lambda: all(len(answer.token_ids) > 1 for answer in early), "the first answers run", PHASE_SECONDS)
        if phase.role == "victim":
            name = DRAINING[self._cell.victim == "router"]
            self._fleet.rendezvous.expect(self._cell.victim, name, 1, self._hurt)
            os.kill(self._victim_pid, signal.SIGTERM)
        else:
            self._fleet.rendezvous.expect(phase.role, phase.failpoint, phase.hit, self._hurt)
        self._send((CHUNKS * CHUNK_TOKENS, 24, "split"), (70, 30, "auto"))
        try:
            await asyncio.wait_for(self._fleet.rendezvous.met.wait(), PHASE_SECONDS)
        except TimeoutError:
            raise Violation("the phase was never reached") from None

    def _send(self, *kinds: tuple[int, int, str]) -> list[Answer]:
        """Send requests of so many prompt tokens, so many output tokens, and this preference."""
        answers = [self._fleet.request(*kind) for kind in kinds]
        self.answers += answers
        self._tasks += [asyncio.create_task(self._fleet.ask(answer)) for answer in answers]
        return answers

    def _hurt(self) -> None:
        self._fleet.look()
        self._hurt_at = time.monotonic()
        os.kill(self._victim_pid, self._cell.signum)

    async def _after_worker(self) -> None:
        """Exact answers, and a new life of the victim."""
        await asyncio.gather(*self._tasks)
        self._check_answers(End.EXACT)
        epoch = self._epochs[self._worker]

        def is_back(workers: dict[str, dict[str, Any]]) -> bool:
            victim = workers[self._worker]
            return bool(victim["state"] == "ready" and victim["epoch"] > epoch)

        await self._fleet.until_workers(is_back, f"{self._worker} comes back", RECOVERY_SECONDS)
        await self._fleet.until_ready()  # a worker that has died is trusted again after a canary
        self._note_return()

    async def _after_router(self) -> None:
        if self._cell.signum is signal.SIGSTOP:
            await asyncio.sleep(FROZEN_SECONDS)
            os.kill(self._victim_pid, signal.SIGCONT)
        if self._cell.signum is signal.SIGSTOP and self._cell.phase.role != "victim":
            await asyncio.gather(*self._tasks)
            self._check_answers(End.EXACT)
            self._note_return()
            return
        status = await self._fleet.ended(PHASE_SECONDS)
        if self._cell.signum is not signal.SIGKILL and status != 0:
            raise Violation(f"exit status {status}")
        await asyncio.gather(*self._tasks)
        self._check_answers(End.EXACT, End.ERROR, End.CUT)
        if self._cell.signum is signal.SIGTERM and self._cell.phase.role != "victim":
            self._check_nothing_cut()
        await until(lambda: not processes.still_alive(self._fleet.family), "its workers end", RECOVERY_SECONDS)
        await self._start_again()

    async def _start_again(self) -> None:
        """A new server at the same port; clients that got no answer retry."""
        await self._fleet.start()
        self._note_return()
        failed = [answer for answer in self.answers if answer.end is not End.EXACT]
        retries = [Answer(answer.prompt, answer.max_tokens, answer.prefer) for answer in failed]
        await asyncio.gather(*map(self._fleet.ask, retries))
        if any(retry.end is not End.EXACT for retry in retries):
            raise Violation(f"retries: {ends(retries)}")

    def _note_return(self) -> None:
        if self._hurt_at is not None:
            self._back_after = time.monotonic() - self._hurt_at

    def _check_answers(self, *allowed: End) -> None:
        if any(answer.end not in allowed for answer in self.answers):
            raise Violation(f"answers: {ends(self.answers)}")

    def _check_nothing_cut(self) -> None:
        """What had begun to be answered was answered to its end."""
        if any(answer.token_ids and answer.end is not End.EXACT for answer in self.answers):
            raise Violation(f"answers: {ends(self.answers)}")

    def summary(self) -> str:
        """In a few words: how the answers ended, the longest pause in one, and when the victim was back."""
        words = [ends(self.answers) or "nothing asked"]
        words.append(f"longest wait {longest_wait(self.answers):.1f} s")
        if self._back_after is not None:
            words.append(f"back after {self._back_after:.1f} s")
        return ", ".join(words)
