"""uvicorn's HTTP/1.1 protocol with bounds on what a stranger can make it hold before a request begins."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from diptych.core.errors import RequestError
from diptych.front.errors import error_body

MAX_HEAD_BYTES = 64 << 10
HEAD_SECONDS = 10.0


class HeadTooLarge(Exception):
    """Raised inside a callback of the parser, which ends the connection."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Limits the size of a request's head, and the time in which it must be complete.

    What cannot be parsed is answered in OpenAI's shape too, and the connection is closed.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_complete()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("request head is too large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_is_complete()
        self._head_bytes = sum(len(name) + len(value) for name, value in self.headers) + len(self.url)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise HeadTooLarge
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        large = self._head_bytes > MAX_HEAD_BYTES
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if large else HTTPStatus.BAD_REQUEST
        text = f"request head is larger than {MAX_HEAD_BYTES} bytes" if large else msg
        error = RequestError(text, code="request_head_too_large" if large else "invalid_http", status=status)
        body = msgspec.json.encode(error_body(error))
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self._head_is_complete()
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _head_is_complete(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
