"""Two hosts on one machine: network namespaces with a shaped link between them (ip-netns(8), tc-tbf(8))."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000
DEVICE = "veth0"
RATE = "1gbit"


@dataclass(frozen=True)
class Host:
    """A network namespace and its address."""

    namespace: str
    address: str

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """What this thread does, and the processes that it starts, happen on this host."""
        with open("/proc/thread-self/ns/net") as before, (NAMESPACES / self.namespace).open() as here:
            _enter(here.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Skips the test where namespaces are not to be had; they are removed in the end."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("network namespaces need iproute2")
    hosts = tuple(Host(f"diptych-{os.getpid()}-{name}", f"10.77.0.{number}") for number, name in enumerate("ab", 1))
    try:
        try:
            for host in hosts:
                _run("ip", "netns", "add", host.namespace)
            _link(*hosts)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            subprocess.run(("ip", "netns", "delete", host.namespace), capture_output=True, check=False)


def _link(left: Host, right: Host) -> None:
    names = ("ip", "-n", left.namespace, "link", "add", "name", DEVICE, "type", "veth", "peer", "name", DEVICE)
    _run(*names, "netns", right.namespace)
    for host in (left, right):
        _run("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", DEVICE)
        _run("ip", "-n", host.namespace, "link", "set", DEVICE, "up")
        _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        shape = ("tc", "-n", host.namespace, "qdisc", "add", "dev", DEVICE, "root", "tbf")
        _run(*shape, "rate", RATE, "burst", "256kb", "latency", "50ms")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns failed")
