"""Addresses: Unix sockets, loopback TCP, and TLS to anywhere."""

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
        ("tls:127.0.0.1:0", TcpAddress("127.0.0.1", 0, tls=True)),
        ("tls:0.0.0.0:80", TcpAddress("0.0.0.0", 80, tls=True)),
        ("tls:10.1.2.3:80", TcpAddress("10.1.2.3", 80, tls=True)),
        ("tls:[2001:db8::1]:80", TcpAddress("2001:db8::1", 80, tls=True)),
        ("tls:example.org:80", TcpAddress("example.org", 80, tls=True)),
    ],
)
def test_addresses_and_how_they_are_written(text: str, address: UnixAddress | TcpAddress) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("host", "unspecified"), [("0.0.0.0", True), ("::", True), ("127.0.0.1", False), ("example.org", False)]
)
def test_addresses_that_stand_for_all_of_a_machines(host: str, unspecified: bool) -> None:
    assert TcpAddress(host, 1).is_unspecified == unspecified


@pytest.mark.parametrize(
    "text",
    ["tcp:0.0.0.0:80", "tcp:192.168.0.1:80", "tcp:example.org:80", "tcp:[::]:80", "tcp:8.8.8.8:53", "tcp:localhost.:1"],
)
def test_nothing_leaves_this_machine_in_plain_text(text: str) -> None:
    with pytest.raises(ConfigError, match="not a loopback address"):
        parse_address(text)


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "tcp:", "tcp:127.0.0.1", "tcp:127.0.0.1:", "tcp::80", "tcp:127.0.0.1:-1", "tcp:127.0.0.1:65536"]
    + [
        "tcp:127.0.0.1:8٣",
        "udp:127.0.0.1:80",
        "tls:127.0.0.1",
        "tls:",
        "tls::80",
        "tls:10.0.0.1:x",
        "/run/a.sock",
        "http://127.0.0.1:80",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        parse_address(text)


@given(text=st.text())
def test_any_text_is_an_address_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_address(text)
