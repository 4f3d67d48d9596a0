"""Named places in the code at which a test makes its process fail, exactly there and nowhere else.

    failpoint("push.layer_sent")        in the code: a dictionary that is empty, unless somebody has armed it

    DIPTYCH_FAILPOINTS="prefill-0#1/push.layer_sent=kill@3; */ticket.minted=delay:0.5@1+"

reads: the first life (epoch) of worker prefill-0 is killed when it gets there for the third time, and every process
waits for half a second each time that it has minted a ticket. The general form is
`PROCESS/NAME=ACTION[:ARGUMENT][@HIT]`, several of them separated by `;`:

- PROCESS is a shell pattern for WORKER#EPOCH, or `router#1` for the process of `diptych serve`;
- HIT counts from 1 (the default) in each process; `3+` means the third time and every time after it;
- ACTION is one of
  kill, stop, term   the signal of that name to this process
  exit               end at once, with status 70
  raise              OSError(EIO), as from a broken disk or socket
  delay              wait for ARGUMENT seconds
  meet               tell whoever listens at the Unix socket ARGUMENT where we are (one line: process, pid, name),
                     and wait until that connection ends: so a test can do anything, to anybody, at exactly this
                     moment. If nobody listens there, go on.
"""

from __future__ import annotations

import errno
import fnmatch
import itertools
import math
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from diptych.core.errors import ConfigError

VARIABLE = "DIPTYCH_FAILPOINTS"
EXIT_STATUS = 70

ACTIONS = ("kill", "stop", "term", "exit", "raise", "delay", "meet")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}

_SPEC = re.compile(
    r"(?P<process>[^/\s]+)/(?P<name>[\w.]+)=(?P<action>[a-z]+)(:(?P<argument>[^@\s]+))?(@(?P<hit>[1-9]\d*)(?P<more>\+?))?"
)


@dataclass(slots=True)
class _Armed:
    """One failpoint that is armed in this process: what happens at hit number `hit` (and after it, if `more`)."""

    act: Callable[[], None]
    hit: int
    more: bool
    _hits: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # `next` is atomic; threads share it

    def is_due(self) -> bool:
        """Count one hit."""
        number = next(self._hits)
        return number == self.hit or (self.more and number > self.hit)


_armed: dict[str, list[_Armed]] = {}


def failpoint(name: str) -> None:
    """The process is at this place now. Does nothing unless the failpoint is armed here."""
    if _armed:
        for armed in [armed for armed in _armed.get(name, ()) if armed.is_due()]:
            armed.act()


def arm(process: str, life: int, text: str | None = None) -> None:
    """Arm what `text` (by default, the environment) says about this process, in place of what was armed before.

    Raises ConfigError for what cannot be read."""
    _armed.clear()
    for spec in (os.environ.get(VARIABLE, "") if text is None else text).split(";"):
        if spec.strip():
            _arm_one(f"{process}#{life}", spec.strip())


def _arm_one(process: str, spec: str) -> None:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ConfigError(f"{VARIABLE}: {spec!r} is not PROCESS/NAME=ACTION[:ARGUMENT][@HIT]")
    name = match["name"]
    act = _action(match["action"], match["argument"] or "", process, name)
    if fnmatch.fnmatchcase(process, match["process"]):
        _armed.setdefault(name, []).append(_Armed(act, int(match["hit"] or 1), bool(match["more"])))


def _action(action: str, argument: str, process: str, name: str) -> Callable[[], None]:
    if action in SIGNALS:
        return lambda: os.kill(os.getpid(), SIGNALS[action])
    match action:
        case "exit":
            return lambda: os._exit(EXIT_STATUS)
        case "raise":
            return lambda: _break(name)
        case "delay":
            seconds = _seconds(argument)
            return lambda: time.sleep(seconds)
        case "meet":
            return lambda: meet(argument, f"{process} {os.getpid()} {name}")
        case other:
            raise ConfigError(f"{VARIABLE}: {other!r} is none of {', '.join(ACTIONS)}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"{VARIABLE}: a delay of {text!r} seconds")
    return seconds


def _break(name: str) -> None:
    raise OSError(errno.EIO, f"failpoint {name}")


def meet(path: str, line: str) -> bytes:
    """Say a line at a Unix socket; returns all that is answered until that connection ends (empty: nobody there)."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
            sock.sendall(f"{line}\n".encode())
            answer = b""
            while part := sock.recv(4096):
                answer += part
        except OSError:
            return b""
    return answer
