"""uvicorn's HTTP/1.1 protocol with bounds on what a stranger can make it hold.

Before a request begins: its head's size, number of headers and time. While it runs: bytes that are no body
(chunk extensions, trailers). After it: the rest of a body that nobody wanted. And always: how many connections there
are, and how long one may go without taking what was sent to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from diptych.core.errors import DiptychError, RequestError, UnavailableError
from diptych.front.errors import error_body, error_headers, status_of

MAX_REFUSING = 64  # connections beyond the limit that are told so; others are closed without a word


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Bounds of one server's connections.

    Attributes:
        max_connections: those beyond it are answered 503 and closed.
        max_head_bytes: of the request line and headers (431).
        max_headers: their number (431).
        head_seconds: in which they must have arrived.
        unread_seconds: a client that takes nothing of what was sent for so long is disconnected.
        linger_seconds: for which a refused client may go on sending: closing at once would reset the connection,
            and with it the answer.
        framing_share: bytes of framing for each byte of a body, beyond the first `max_head_bytes`.
    """

    max_connections: int = 8192
    max_head_bytes: int = 64 << 10
    max_headers: int = 128
    head_seconds: float = 10.0
    unread_seconds: float = 60.0
    linger_seconds: float = 1.0
    framing_share: int = 16


class LimitExceeded(Exception):
    """Raised inside a callback of the parser, which ends the connection."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """What cannot be parsed or exceeds a limit is answered in OpenAI's shape, and the connection is closed."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _body_bytes = 0  # of the request that is being received
    _framing_bytes = 0
    _refused = False

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._receiving = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._drop_if_unread(transport)
        too_many = len(self.connections) - self._limits.max_connections
        if too_many > MAX_REFUSING:
            transport.abort()
        elif too_many > 0:
            message = f"{self._limits.max_connections} connections are open, and there cannot be more"
            self._refuse(UnavailableError(message, retry_after=self._limits.head_seconds, code="too_many_connections"))
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_complete()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return  # it may finish its sentence
        self._framing_bytes += len(data)
        super().data_received(data)
        if self._head_timer is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            self._check_head_bytes()
        elif self._receiving and self._too_much_framing():
            self._refuse(RequestError("the body is mostly framing", code="invalid_http"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._receiving = True
        self._body_bytes = self._framing_bytes = 0
        self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= self._limits.max_headers:
            self._head_bytes = max(self._head_bytes, self._limits.max_head_bytes + 1)
            raise LimitExceeded
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_is_complete()
        self._head_bytes = sum(len(name) + len(value) for name, value in self.headers) + len(self.url)
        if self._head_bytes > self._limits.max_head_bytes:
            raise LimitExceeded
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._receiving = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        cycle = self.cycle
        if cycle.response_complete and cycle.more_body and not self.transport.is_closing():
            self._linger()  # the answer came before the end of the question: what follows is read by nobody

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > self._limits.max_head_bytes:
            text = (
                f"request head is larger than {self._limits.max_head_bytes} bytes or {self._limits.max_headers} lines"
            )
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            self._refuse(RequestError(text, code="request_head_too_large", status=status))
        else:
            self._refuse(RequestError(msg, code="invalid_http"))

    def _check_head_bytes(self) -> None:
        if self._head_bytes > self._limits.max_head_bytes:
            self.send_400_response("")

    def _too_much_framing(self) -> bool:
        framing = self._framing_bytes - self._body_bytes
        return framing > self._limits.max_head_bytes + self._limits.framing_share * self._body_bytes

    def _refuse(self, error: DiptychError) -> None:
        """Answer, and take nothing in any more. In the middle of another answer there is only the end."""
        self._head_is_complete()
        cycle = self.cycle
        if self.pipeline or (cycle is not None and cycle.response_started and not cycle.response_complete):
            self._refused = True
            self.transport.close()
            return
        if cycle is not None and not cycle.response_complete:  # whoever waits for the rest of its body need not
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.write(_response(error))
        self._linger()

    def _linger(self) -> None:
        """End the connection, but let the client read the answer first."""
        self._refused = True
        with contextlib.suppress(OSError, NotImplementedError):
            self.transport.write_eof()
        self.loop.call_later(self._limits.linger_seconds, self.transport.abort)

    def _drop_if_unread(self, transport: asyncio.Transport) -> None:
        """Have the kernel end the connection of a client that reads nothing (tcp(7), TCP_USER_TIMEOUT)."""
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            milliseconds = int(self._limits.unread_seconds * 1000)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(self._limits.head_seconds, self.transport.close)

    def _head_is_complete(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _response(error: DiptychError) -> bytes:
    """A whole HTTP response that says this, and that the connection ends here."""
    status = HTTPStatus(status_of(error))
    body = msgspec.json.encode(error_body(error))
    headers = error_headers(error) | {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n{lines}\r\n".encode("ascii") + body
