"""Failpoints: nothing without a word in the environment, and exactly what was said with one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diptych.chaos import detour, failpoints
from diptych.chaos.failpoints import EXIT_STATUS, VARIABLE, arm, failpoint
from diptych.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm("nobody", 1, "")


def reached(name: str, times: int) -> list[int]:
    """At which of so many hits (from 1) an OSError came."""
    hits = []
    for number in range(1, times + 1):
        try:
            failpoint(name)
        except OSError:
            hits.append(number)
    return hits


def test_nothing_happens_unless_armed() -> None:
    assert reached("push.layer_sent", 3) == []


@pytest.mark.parametrize(
    ("spec", "hits"),
    [
        ("w-0#1/a.b=raise", [1]),
        ("w-0#1/a.b=raise@3", [3]),
        ("w-0#1/a.b=raise@3+", [3, 4, 5]),
        ("*/a.b=raise@1+", [1, 2, 3, 4, 5]),
        ("w-*#*/a.b=raise@2;*/a.b=raise@4", [2, 4]),
        (" *#1/a.b=raise ; ", [1]),
        ("w-0#2/a.b=raise", []),
        ("w-1#1/a.b=raise", []),
        ("*/a.c=raise", []),
    ],
)
def test_who_where_and_when(spec: str, hits: list[int]) -> None:
    arm("w-0", 1, spec)
    assert reached("a.b", 5) == hits


def test_arming_again_replaces() -> None:
    arm("w-0", 1, "*/a=raise@1+")
    arm("w-0", 1, "*/b=raise@1+")
    assert (reached("a", 2), reached("b", 2)) == ([], [1, 2])


def test_hits_are_counted_over_all_threads() -> None:
    arm("w-0", 1, "*/a=raise@100")
    counts: list[int] = []
    threads = [threading.Thread(target=lambda: counts.append(len(reached("a", 25)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 1


@pytest.mark.parametrize(
    "spec",
    ["a.b", "w/a.b", "w/a.b=explode", "w/a.b=kill@0", "w/a b=kill", "/a=kill", "w/a=kill@x"]
    + [f"w/a=delay{argument}" for argument in ("", ":soon", ":-1", ":nan", ":inf")],
)
def test_what_cannot_be_read_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=VARIABLE):
        arm("w", 1, spec)


def test_a_delay_is_a_delay() -> None:
    arm("w", 1, "*/a=delay:0.05")
    began = time.monotonic()
    failpoint("a")
    assert time.monotonic() - began >= 0.05


PROGRAM = """
from diptych.chaos.failpoints import arm, failpoint
import signal
signal.signal(signal.SIGTERM, lambda *_: print("term", flush=True))
arm("w", 1)
for number in (1, 2, 3):
    print(number, flush=True)
    failpoint("a")
"""


@pytest.mark.parametrize(
    ("action", "status", "printed"),
    [
        ("kill", -signal.SIGKILL, ["1", "2"]),
        ("exit", EXIT_STATUS, ["1", "2"]),
        ("term", 0, ["1", "2", "term", "3"]),
    ],
)
def test_how_a_process_ends(action: str, status: int, printed: list[str]) -> None:
    environment = os.environ | {VARIABLE: f"w#1/a={action}@2"}
    ended = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.split()) == (status, printed), ended.stderr


def test_a_stopped_process_can_go_on() -> None:
    environment = os.environ | {VARIABLE: "w#1/a=stop@2"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        pid, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        os.kill(pid, signal.SIGCONT)
        assert process.stdout is not None
        assert process.stdout.read().split() == ["1", "2", "3"]


def serve_once(path: Path, answer: bytes, said: list[bytes]) -> threading.Thread:
    """Take one connection at a Unix socket, note what is said, and answer."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            said.append(connection.recv(1000))
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_a_meeting_says_who_is_where_and_waits(tmp_path: Path) -> None:
    said: list[bytes] = []
    host = serve_once(tmp_path / "meet", b"", said)
    arm("decode-0", 3, f"*/ticket.minted=meet:{tmp_path}/meet")
    failpoint("ticket.minted")
    assert said == [f"decode-0#3 {os.getpid()} ticket.minted\n".encode()]
    host.join()


def test_nobody_to_meet_keeps_nobody_waiting(tmp_path: Path) -> None:
    arm("decode-0", 1, f"*/a=meet:{tmp_path}/nobody")
    failpoint("a")


def test_detours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(detour.VARIABLE, raising=False)
    assert detour.detour("tcp:127.0.0.1:7") == "tcp:127.0.0.1:7"
    monkeypatch.setenv(detour.VARIABLE, str(tmp_path / "guide"))
    assert detour.detour("unix:/x") == "unix:/x"
    with pytest.raises(ConfigError, match=detour.VARIABLE):
        detour.detour("tcp:127.0.0.1:7")
    said: list[bytes] = []
    guide = serve_once(tmp_path / "guide", b"tcp:127.0.0.1:8", said)
    assert detour.detour("tcp:127.0.0.1:7") == "tcp:127.0.0.1:8"
    guide.join()
    assert said == [b"tcp:127.0.0.1:7\n"]


def test_every_name_in_the_code_is_one_of_a_kind() -> None:
    """A name stands for one place."""
    source = Path(failpoints.__file__).parents[1]
    texts = (path.read_text() for path in source.rglob("*.py") if path.parent.name != "chaos")
    names = [line.strip() for text in texts for line in text.splitlines() if line.strip().startswith("failpoint(")]
    assert len(names) == len(set(names)) > 10
