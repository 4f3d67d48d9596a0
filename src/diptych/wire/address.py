"""Addresses of channels: `unix:PATH`, `tcp:HOST:PORT` on this machine, `tls:HOST:PORT` anywhere."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from diptych.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """`tls` says that the connection is encrypted (see `wire.tls`)."""

    host: str
    port: int
    tls: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'tcp'}:{host}:{self.port}"

    @property
    def is_unspecified(self) -> bool:
        """Whether it stands for every address of a machine, so that nobody can be told to connect to it."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


def parse_address(text: str) -> UnixAddress | TcpAddress:
    """Raises ConfigError for what is no address, and for a routable one (which `0.0.0.0` is, too) without TLS:
    plain channels are authenticated but not encrypted, so they do not leave this machine."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return UnixAddress(rest)
    host, _, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if kind not in ("tcp", "tls") or not host or not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise ConfigError(f"{text!r} is no address; write unix:PATH, tcp:HOST:PORT or tls:HOST:PORT")
    if kind == "tcp" and not _is_loopback(host):
        raise ConfigError(
            f"{host} is not a loopback address; channels between hosts need TLS: give --tls on both sides"
        )
    return TcpAddress(host, int(port), tls=kind == "tls")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
