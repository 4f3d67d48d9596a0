"""A real `diptych serve` under test: started, asked, ended, and nothing of it left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import httpx

from diptych.bench import processes
from diptych.bench.processes import ProcessStat

COMMAND = (sys.executable, "-m", "diptych", "serve")
SCRIPTED = ("--engine", "scripted")
ENVIRONMENT = os.environ | {"COLUMNS": "200"}  # the screen breaks no line in the middle of a URL
READY = re.compile(r"serves (\S+) at (http://\S+)/v1")
START_SECONDS = 90.0
STOP_SECONDS = 20.0
SOON_SECONDS = 15.0  # for what happens by itself, if later rather than sooner on a busy machine
LOOK_EVERY = 0.02

Result = TypeVar("Result")


@dataclass
class Server:
    """A `diptych serve` that is up. `screen` grows by what it prints."""

    process: subprocess.Popen[str]
    screen: list[str] = field(default_factory=list)
    model: str = ""
    url: str = ""

    @cached_property
    def http(self) -> httpx.Client:
        limits = httpx.Limits(max_connections=None)
        return httpx.Client(base_url=self.url, timeout=120.0, limits=limits, trust_env=False)

    def fleet(self) -> dict[str, dict[str, Any]]:
        """`/fleet`, by worker."""
        return {worker["id"]: worker for worker in self.http.get("/fleet").json()["workers"]}

    def metric(self, name: str) -> float:
        """The sum of one metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        values = [line.rpartition(" ")[2] for line in lines if re.match(rf"{name}[ {{]", line)]
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def processes(self) -> dict[int, ProcessStat]:
        """The server's processes, workers included, as they are now."""
        return processes.tree(self.process.pid)

    def complete(self, prompt: Sequence[int] | str, prefer: str | None = None, **fields: Any) -> Completion:
        """One greedy answer of /v1/completions (unless `fields` say otherwise)."""
        response = self.http.post("/v1/completions", json=self.body(prompt, **fields), headers=prefer_header(prefer))
        assert response.status_code == 200, response.text
        return Completion(response.json(), response.headers["x-diptych-route"])

    def complete_all(
        self, prompts: Sequence[Sequence[int]], prefer: str, *, in_flight: int, **fields: Any
    ) -> list[Completion]:
        """Answers in the order of the prompts, of which `in_flight` are on their way at any time."""
        with ThreadPoolExecutor(in_flight) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, prefer, **fields), prompts))

    @contextlib.contextmanager
    def stream(self, prompt: Sequence[int] | str, prefer: str | None = None, **fields: Any) -> Iterator[Stream]:
        """A streamed answer, read as it comes; leaving early disconnects."""
        body = self.body(prompt, stream=True, **fields)
        with self.http.stream("POST", "/v1/completions", json=body, headers=prefer_header(prefer)) as response:
            assert response.status_code == 200, response.read()
            yield Stream(response)

    def body(self, prompt: Sequence[int] | str, **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "prompt": prompt, "temperature": 0, "return_token_ids": True} | fields


@dataclass(frozen=True)
class Completion:
    body: dict[str, Any]
    route: str

    @property
    def token_ids(self) -> list[int]:
        ids: list[int] = self.body["choices"][0]["token_ids"]
        return ids

    @property
    def cached_tokens(self) -> int:
        return int(self.body["usage"]["prompt_tokens_details"]["cached_tokens"])


@dataclass
class Stream:
    """Server-sent events of one answer. `error` is set if it ended with one, `done` if with [DONE]."""

    response: httpx.Response
    error: dict[str, Any] | None = None
    done: bool = False

    @property
    def route(self) -> str:
        return self.response.headers["x-diptych-route"]

    @cached_property
    def token_ids(self) -> Iterator[int]:
        """Each token as it comes."""
        return self._token_ids()

    def _token_ids(self) -> Iterator[int]:
        for line in self.response.iter_lines():
            if line == "data: [DONE]":
                self.done = True
            elif line and not line.startswith(":"):
                event = json.loads(line.removeprefix("data: "))
                self.error = event.get("error")
                yield from (token for choice in event.get("choices", ()) for token in choice["token_ids"])


def prefer_header(prefer: str | None) -> dict[str, str]:
    return {} if prefer is None else {"x-diptych-prefer": prefer}


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """`diptych serve FLAGS` on a free port while the context lasts; ended by SIGINT unless it has ended before."""
    with launched(*flags, "--port", "0") as process:
        server = Server(process)
        started = threading.Event()
        reader = threading.Thread(target=_read_screen, args=(server, started))
        reader.start()
        try:
            assert started.wait(START_SECONDS), "\n".join(["not up in time", *server.screen])
            assert server.url, "\n".join(["ended before it was up", *server.screen])
            yield server
            server.http.close()
        finally:
            end(process)
            reader.join()


@contextlib.contextmanager
def launched(*flags: str) -> Iterator[subprocess.Popen[str]]:
    """The bare process, its standard error in a pipe; whatever is left of it in the end is killed."""
    process = subprocess.Popen(
        (*COMMAND, *flags), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        yield process
    finally:
        for pid in processes.tree(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def end(process: subprocess.Popen[str], signum: signal.Signals = signal.SIGINT) -> int:
    """Ask a server to end and wait until all of its processes have; returns its exit status."""
    family = processes.tree(process.pid)
    if process.poll() is None:
        process.send_signal(signum)
    status = process.wait(STOP_SECONDS)
    soon(lambda: not processes.still_alive(family), "every process ends")
    return status


def soon(happened: Callable[[], Result], what: str, within: float = SOON_SECONDS) -> Result:
    """Wait until `happened()` is true, and return what it returned."""
    deadline = time.monotonic() + within
    while not (result := happened()):
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(LOOK_EVERY)
    return result


def is_idle(server: Server) -> bool:
    """No worker holds anything of a request."""
    held = ("kv_blocks_used", "running", "waiting")
    return not any(worker[name] for worker in server.fleet().values() for name in held)


def _read_screen(server: Server, started: threading.Event) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.screen.append(line.rstrip())
        if match := READY.search(line):
            server.model, server.url = match.groups()
            started.set()
    started.set()  # it will not come up any more
