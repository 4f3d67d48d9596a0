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
    return _checked(TcpAddress(host, int(port), tls=kind == "tls"))


def parse_host_port(text: str, *, tls: bool) -> TcpAddress:
    """The address that an operator writes as HOST:PORT. Raises ConfigError as `parse_address` does."""
    address = parse_address(f"{'tls' if tls else 'tcp'}:{text}")
    if isinstance(address, UnixAddress):
        raise ConfigError(f"{text!r} is no address; write HOST:PORT")
    return address


def advertised(address: TcpAddress) -> TcpAddress:
    """An address that others are told to connect to. Raises ConfigError for one that stands for all of a
    machine's, and for a routable one without TLS."""
    if address.is_unspecified:
        raise ConfigError(f"{address.host} stands for any address; say with --advertise how others reach this machine")
    return _checked(address)


def _checked(address: TcpAddress) -> TcpAddress:
    if not address.tls and not _is_loopback(address.host):
        raise ConfigError(
            f"{address.host} is not a loopback address; channels between hosts need TLS (--tls on both sides)"
        )
    return address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
