"""Addresses: Unix sockets and loopback TCP, nothing else."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.errors import ConfigError
from diptych.wire.address import TcpAddress, UnixAddress, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/a:b.sock", UnixAddress("/run/a:b.sock")),
        ("tcp:127.0.0.1:0", TcpAddress("127.0.0.1", 0)),
        ("tcp:127.9.9.9:65535", TcpAddress("127.9.9.9", 65535)),
        ("tcp:localhost:80", TcpAddress("localhost", 80)),
        ("tcp:[::1]:80", TcpAddress("::1", 80)),
    ],
)
def test_loopback(text: str, address: UnixAddress | TcpAddress) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["tcp:0.0.0.0:80", "tcp:192.168.0.1:80", "tcp:example.org:80", "tcp:[::]:80", "tcp:8.8.8.8:53", "tcp:localhost.:1"],
)
def test_nothing_leaves_this_machine(text: str) -> None:
    with pytest.raises(ConfigError, match="not a loopback address"):
        parse_address(text)


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "tcp:", "tcp:127.0.0.1", "tcp:127.0.0.1:", "tcp::80", "tcp:127.0.0.1:-1", "tcp:127.0.0.1:65536"]
    + ["tcp:127.0.0.1:8٣", "udp:127.0.0.1:80", "/run/a.sock", "http://127.0.0.1:80"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        parse_address(text)


@given(text=st.text())
def test_any_text_is_an_address_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_address(text)
