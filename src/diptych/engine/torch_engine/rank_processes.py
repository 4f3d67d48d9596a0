"""A worker's rank processes, as their leader sees them: started together, asked together, ended together."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from diptych.core.errors import CheckpointError, ConfigError, DiptychError, EngineLost, ProtocolError
from diptych.engine.threads import thread_environment
from diptych.engine.torch_engine.rank_messages import MAX_MESSAGE_BYTES, Failed, FromRank, ToRank
from diptych.wire.blocking import BlockingConnection, socket_pair

COMMAND = (sys.executable, "-m", "diptych.engine.torch_engine.rank")
# Ranks of a worker meet on this host only, whatever its name resolves to.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
GRACE = 2.0  # seconds for a rank to end by itself, which takes it no time unless it has been stopped
START_UP_ERRORS = {kind.code: kind for kind in (ConfigError, CheckpointError)}
SILENCE_SECONDS = 120.0  # in the middle of a step; the router has moved its streams away long before
CAUSE_SECONDS = 1.0  # for the rank that failed first to be heard after one that failed for its sake


class ProcessEnds:
    """The ends of some children of ours, seen from any thread."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._descriptors = [os.pidfd_open(pid) for pid in pids]

    def first(self) -> int:
        """Wait, in the kernel, until one has ended; which. To be called once."""
        ended = select.poll()
        for descriptor in self._descriptors:
            ended.register(descriptor, select.POLLIN)
        [descriptor, _], *_ = ended.poll()
        index = self._descriptors.index(descriptor)
        for descriptor in self._descriptors:
            os.close(descriptor)
        return index


class RankProcesses:
    """`count` processes. What is wrong with one of them is wrong with all, since the others cannot go on without:
    then all are ended, and every call raises what has happened, EngineLost or (while loading) ConfigError. `failure` is
    that, or None. For one thread at a time."""

    def __init__(self, count: int) -> None:
        self.failure: DiptychError | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[BlockingConnection[FromRank]] = []
        self._descriptors: list[int] = []  # of the connections
        self._readable = select.poll()
        self._ready: list[int] = []  # ranks that have something to say
        for _ in range(count):
            here, there = socket_pair()
            with there:
                self._processes.append(_start_process(there.fileno()))
            self._connections.append(BlockingConnection(here, FromRank, MAX_MESSAGE_BYTES))
            self._descriptors.append(here.fileno())
            self._readable.register(here, select.POLLIN)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def send(self, rank: int, message: ToRank, descriptor: int | None = None) -> None:
        """Send a message to a rank, and a descriptor after it."""
        self._check()
        try:
            self._connections[rank].send(message)
            if descriptor is not None:
                self._connections[rank].send_descriptor(descriptor)
        except OSError as error:
            raise self._fail(rank, None) from error

    def receive(self, seconds: float | None = None) -> tuple[int, FromRank]:
        """What comes next from any of the ranks, and from which. Waits for as long as it takes, or `seconds`: then one
        of them is stuck (and mostly all the others, who wait for it)."""
        self._check()
        if not self._ready:
            self._ready = self._poll(seconds)
        if not self._ready:
            self.failure = EngineLost(f"no rank has said anything for {seconds:g} s: one of them is stuck")
            self.close()
            raise self.failure
        rank = self._ready.pop()
        message = self._receive(rank)
        if message is None or isinstance(message, Failed):
            raise self._fail(rank, message)
        return rank, message

    def ends(self) -> ProcessEnds:
        """Something that waits for the first of them to end. To be asked for before any can have been reaped."""
        return ProcessEnds([process.pid for process in self._processes])

    def ended(self, rank: int) -> DiptychError:
        """A rank has ended while nobody was speaking to it: end all. Returns what happened."""
        return self._fail(rank, None)

    def close(self) -> None:
        """End all ranks: they end when their connections do, or by force."""
        self.failure = self.failure or EngineLost("the engine has been closed")
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + GRACE
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _poll(self, seconds: float | None) -> list[int]:
        """Wait for ranks that have something to say."""
        events = self._readable.poll(None if seconds is None else seconds * 1000)
        return [self._descriptors.index(descriptor) for descriptor, _ in events]

    def _receive(self, rank: int) -> FromRank | None:
        """The next message of a rank; None if it has ended without one."""
        try:
            return self._connections[rank].receive()
        except (OSError, ProtocolError):
            return None

    def _fail(self, rank: int, last_word: Failed | None) -> DiptychError:
        """End everything. What there is to say about it: the cause, and not what has followed from it."""
        rank, last_word = self._first_cause(rank, last_word)
        if last_word is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[rank].wait(GRACE)
            self.failure = EngineLost(f"rank {rank} has ended ({_how(self._processes[rank].poll())})")
        else:
            kind = START_UP_ERRORS.get(last_word.code, EngineLost)
            self.failure = kind(f"rank {rank}: {last_word.message}")
        self.close()
        return self.failure

    def _first_cause(self, rank: int, last_word: Failed | None) -> tuple[int, Failed | None]:
        """When a rank dies, others fail for its sake, and may be heard first: who ended without a word?"""
        if last_word is None or last_word.code in START_UP_ERRORS:
            return rank, last_word
        deadline = time.monotonic() + CAUSE_SECONDS
        self._readable.unregister(self._descriptors[rank])
        num_others = len(self._descriptors) - 1
        while num_others and (left := deadline - time.monotonic()) > 0:
            for other in self._poll(left):
                message = self._receive(other)
                if message is None:
                    return other, None
                if isinstance(message, Failed):
                    self._readable.unregister(self._descriptors[other])
                    num_others -= 1
        return rank, last_word


def _start_process(descriptor: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        (*COMMAND, str(descriptor)),
        stdin=subprocess.DEVNULL,
        env={**os.environ, **thread_environment(1), **LOOPBACK},
        pass_fds=(descriptor,),
        start_new_session=True,  # a terminal's Ctrl-C is for the leader
    )


def _how(code: int | None) -> str:
    if code is None:
        return "its connection, at least"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
