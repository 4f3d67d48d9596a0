"""A real `diptych serve --engine scripted` that is about to be hurt, and everything needed to see how it takes that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import aiohttp

from diptych.bench import processes
from diptych.bench.processes import ProcessStat
from diptych.bench.server import HOST, free_port
from diptych.engine.scripted import expected_tokens

START_SECONDS = 60.0
STOP_SECONDS = 40.0
IDLE_SECONDS = 60.0  # until all KV blocks are back
ANSWER_SECONDS = 200.0  # longer than any deadline inside the fleet
LOOK_EVERY = 0.05  # seconds between two looks at something that happens by itself


class Violation(Exception):
    """Something happened that must not."""


async def until(happened: Callable[[], Any], what: str, within: float) -> None:
    """Look until `happened()` is true. Raises Violation if that takes too long."""
    deadline = time.monotonic() + within
    while not happened():
        if time.monotonic() > deadline:
            raise Violation(f"not within {within:g} s: {what}")
        await asyncio.sleep(LOOK_EVERY)


class Rendezvous:
    """Where processes come that have reached a failpoint armed with `meet`: they wait until we let them go on."""

    def __init__(self) -> None:
        self._wanted: tuple[str, str] = ("", "")
        self._left = 0
        self._act: Callable[[], None] = lambda: None
        self.met = asyncio.Event()

    @contextlib.asynccontextmanager
    async def open(self, path: Path) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(self._on_meeting, path)
        try:
            yield
        finally:
            server.close()

    def expect(self, role: str, failpoint: str, hit: int, act: Callable[[], None]) -> None:
        """From now on: `act()` while a process of that role waits at its hit number `hit` of the failpoint."""
        self.met.clear()
        self._wanted, self._left, self._act = (role, failpoint), hit, act

    async def _on_meeting(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            process, _, failpoint = (await reader.readline()).decode().split()
            if (process.partition("#")[0].partition("-")[0], failpoint) == self._wanted:
                self._left -= 1
                if self._left == 0:
                    self._act()
                    self.met.set()
        finally:
            writer.close()


class End(StrEnum):
    """How an answer ended, as its client sees it."""

    EXACT = "exact"  # every token, and no other
    WRONG = "WRONG"  # a token that the undisturbed run does not have, or too many
    ERROR = "error"  # an error object in the stream, or as the answer
    CUT = "cut"  # the connection broke, or was refused


@dataclass(slots=True)
class Answer:
    """One request and what has come of it so far. `times` (monotonic seconds): when it was sent, then of each token."""

    prompt: list[int]
    max_tokens: int
    prefer: str
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    end: End | None = None
    code: str = ""  # of an error

    @property
    def longest_wait(self) -> float:
        """For the first token, or between two tokens; seconds."""
        return max((later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)), default=0.0)

    def judge(self, *, done: bool, code: str) -> None:
        """Compare with the undisturbed run: what came must be its beginning, or, if the stream is `done`, all of it."""
        expected = expected_tokens(self.prompt, self.max_tokens)
        right = self.token_ids == (expected if done else expected[: len(self.token_ids)])
        self.code = code
        self.end = (End.EXACT if done else End.ERROR if code else End.CUT) if right else End.WRONG


@dataclass
class Fleet:
    """One server and its workers, in a directory that is all theirs. `family` is every process that it ever had."""

    directory: Path
    flags: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    engine: str = "scripted"
    port: int = field(default_factory=free_port)
    process: asyncio.subprocess.Process | None = None
    joined: list[asyncio.subprocess.Process] = field(default_factory=list)
    family: dict[int, ProcessStat] = field(default_factory=dict)
    rendezvous: Rendezvous = field(default_factory=Rendezvous)
    _session: aiohttp.ClientSession | None = None
    _random: random.Random = field(default_factory=random.Random)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Fleet]:
        """What is started lasts as long as the context. In the end nothing is left; Violation if that took force."""
        (self.directory / "tmp").mkdir(parents=True)
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(f"http://{HOST}:{self.port}", timeout=timeout, connector=connector) as session:
            self._session = session
            async with self.rendezvous.open(self.directory / "meet"):
                try:
                    yield self
                    await self.stop()
                finally:
                    await self._kill_all()

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise ValueError("the fleet is not running")
        return self._session

    @property
    def pid(self) -> int:
        if self.process is None:
            raise ValueError("the fleet is not running")
        return self.process.pid

    # processes

    async def start(self) -> None:
        """Start the server (again) and wait until it is ready."""
        await self.launch()
        await self.until_ready()

    async def launch(self) -> None:
        """Start the server's process."""
        self.process = await self._spawn("serve", "--port", str(self.port), *self.flags)

    async def launch_worker(self, *flags: str) -> None:
        """Start a worker that joins."""
        self.joined.append(await self._spawn("worker", *flags))

    async def _spawn(self, command: str, *flags: str) -> asyncio.subprocess.Process:
        with (self.directory / "log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "diptych", command, "--engine", self.engine, *flags),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"TMPDIR": str(self.directory / "tmp"), "COLUMNS": "200"} | self.environment,
            )

    async def until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not await self.ready():
            if self.process is None or self.process.returncode is not None or time.monotonic() > deadline:
                raise Violation(f"the server does not come up: {self.log()[-500:]}")
            await asyncio.sleep(LOOK_EVERY)
        self.look()

    def look(self) -> None:
        """Remember the processes that there are now."""
        for process in (self.process, *self.joined):
            self.family |= processes.tree(process.pid) if process is not None else {}

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    async def stop(self) -> None:
        """As Ctrl-C does. Raises Violation if it is not an orderly end that leaves nothing behind."""
        self.look()
        os.kill(self.pid, signal.SIGINT)
        status = await self.ended(STOP_SECONDS)
        if status != 0:
            raise Violation(f"exit status {status} after SIGINT")
        await self.check_nothing_left()

    async def ended(self, within: float) -> int:
        """Wait for the server's own end; returns its exit status. Raises Violation if it does not end."""
        if self.process is None:
            raise ValueError("the fleet is not running")
        try:
            return await asyncio.wait_for(self.process.wait(), within)
        except TimeoutError:
            raise Violation(f"the server has not ended after {within:g} s") from None

    async def check_nothing_left(self) -> None:
        """No process of this fleet, and no file."""
        await until(lambda: not processes.still_alive(self.family), "every process ends", STOP_SECONDS)
        left = [path.name for path in (self.directory / "tmp").rglob("*")]
        if left:
            raise Violation(f"left behind: {', '.join(sorted(left))}")

    async def _kill_all(self) -> None:
        if self.process is None:
            return
        self.look()
        for pid in processes.still_alive(self.family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in (self.process, *self.joined):
            await process.wait()

    # what clients and operators see

    async def ready(self) -> bool:
        try:
            async with self.session.get("/ready", timeout=aiohttp.ClientTimeout(total=5)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def workers(self) -> dict[str, dict[str, Any]]:
        """`/fleet`, by worker."""
        async with self.session.get("/fleet") as response:
            return {worker["id"]: worker for worker in (await response.json())["workers"]}

    async def until_workers(
        self, happened: Callable[[dict[str, dict[str, Any]]], Any], what: str, within: float
    ) -> None:
        """Look at `/fleet` until it is as wanted. Raises Violation if that takes too long."""
        deadline = time.monotonic() + within
        while not happened(workers := await self.workers()):
            if time.monotonic() > deadline:
                raise Violation(f"not within {within:g} s: {what}; {_short(workers)}")
            await asyncio.sleep(LOOK_EVERY)

    async def check_next_request(self) -> None:
        """One more request is answered as it should be, and then nobody holds any block. Raises Violation."""
        answer = await self.ask(self.request(100, 20, "auto"))
        if answer.end is not End.EXACT:
            raise Violation(f"the request afterwards: {answer.end} {answer.code}")
        await self.until_workers(is_idle, "every KV block is given back", IDLE_SECONDS)

    def request(self, num_prompt: int, max_tokens: int, prefer: str) -> Answer:
        """A request that nobody has made before, not sent yet."""
        return Answer([self._random.randrange(1, 256) for _ in range(num_prompt)], max_tokens, prefer)

    async def ask(self, answer: Answer) -> Answer:
        """Send the request and read its stream to the end, whichever that is."""
        body = {
            "model": "scripted",
            "prompt": answer.prompt,
            "max_tokens": answer.max_tokens,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        }
        headers = {} if answer.prefer == "auto" else {"x-diptych-prefer": answer.prefer}
        done, code = False, ""
        answer.times.append(time.monotonic())
        with contextlib.suppress(aiohttp.ClientError):  # a broken stream is judged by what has come
            try:
                async with self.session.post("/v1/completions", json=body, headers=headers) as response:
                    if response.status != 200:
                        code = (await response.json())["error"]["code"]
                    async for line in response.content:
                        done = done or line.startswith(b"data: [DONE]")
                        if line.startswith(b"data: {"):
                            code = _take(answer, json.loads(line.removeprefix(b"data: "))) or code
            except TimeoutError:
                code = "no end"
        answer.judge(done=done, code=code)
        return answer


def _take(answer: Answer, event: dict[str, Any]) -> str:
    """Note one event's tokens; returns the code of an error."""
    if "error" in event:
        return str(event["error"]["code"])
    for choice in event["choices"]:
        new: Sequence[int] = choice.get("token_ids") or ()
        answer.token_ids += new
        answer.times += [time.monotonic()] * len(new)
    return ""


def ends(answers: Iterable[Answer]) -> str:
    """How they ended, in a few words."""
    counts = Counter(f"{answer.end or 'no end'}{f' ({answer.code})' if answer.code else ''}" for answer in answers)
    return ", ".join(f"{count} {end}" for end, count in sorted(counts.items()))


def longest_wait(answers: Iterable[Answer]) -> float:
    """Of any of their clients, in seconds."""
    return max((answer.longest_wait for answer in answers), default=0.0)


def is_idle(workers: dict[str, dict[str, Any]]) -> bool:
    """Nobody holds anything of a request."""
    return not any(worker[name] for worker in workers.values() for name in ("kv_blocks_used", "running", "waiting"))


def _short(workers: dict[str, dict[str, Any]]) -> str:
    names = ("state", "epoch", "kv_blocks_used", "running", "waiting")
    return "; ".join(f"{name}: {', '.join(str(worker[key]) for key in names)}" for name, worker in workers.items())
