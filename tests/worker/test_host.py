"""Which workers can share memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diptych.worker import host

PRINT = "from diptych.worker.host import host_identity; print(host_identity())"


def test_processes_of_one_host_say_the_same_and_do_not_say_which() -> None:
    other = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True, timeout=60)
    assert other.stdout.strip() == host.host_identity()
    assert host.host_identity() not in host.BOOT_ID.read_text().replace("-", "")


@pytest.mark.parametrize("differs", ["kernel", "file system", "user"])
def test_whatever_keeps_two_from_sharing_tells_them_apart(differs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = host.host_identity()
    if differs == "kernel":
        monkeypatch.setattr(type(host.BOOT_ID), "read_text", lambda _: "another boot\n")
    elif differs == "file system":
        monkeypatch.setattr(host.os, "readlink", lambda _: "mnt:[1]")
    else:
        monkeypatch.setattr(host.os, "getuid", lambda: 4242)
    assert host.host_identity() != here
