"""Addresses of channels: `unix:PATH` or `tcp:HOST:PORT`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from diptych.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: str


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int


def parse_address(text: str) -> UnixAddress | TcpAddress:
    """Raises ConfigError for anything but a Unix socket or a loopback TCP address: channels are
    authenticated but not yet encrypted, so they do not leave this machine."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return UnixAddress(rest)
    host, _, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if kind != "tcp" or not host or not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise ConfigError(f"{text!r} is no address; write unix:PATH or tcp:HOST:PORT")
    if not _is_loopback(host):
        raise ConfigError(
            f"{text!r} is not a loopback address; channels between hosts need TLS, which is still to come"
        )
    return TcpAddress(host, int(port))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
