"""Answers as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from diptych.core.errors import DiptychError, OverloadedError, RequestError
from diptych.front.answers import ChatAnswer, CompletionAnswer
from diptych.front.choice import Delta
from diptych.front.disconnect import ClientGone, while_connected
from diptych.front.errors import INTERNAL_ERROR, error_body
from diptych.front.generation import Generation
from diptych.front.settings import FrontSettings

log = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"


class EventStream(Response):
    """Server-sent events (WHATWG HTML, "Server-sent events"), one per chunk, `[DONE]` last.

    A failure in the middle becomes an event with `error` and the stream ends without `[DONE]`, so that no
    client takes it for a complete answer. While there is nothing to say, a comment now and then says so.
    """

    def __init__(
        self,
        generation: Generation,
        writer: ChatAnswer | CompletionAnswer,
        starting: asyncio.Task[list[Delta]],
        settings: FrontSettings,
        on_end: Callable[[Generation, str], None],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"} | generation.headers())
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self._generation = generation
        self._writer = writer
        self._starting = starting
        self._settings = settings
        self._last_write = 0.0
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "cancelled"
        try:
            with contextlib.suppress(ClientGone):
                outcome = await while_connected(receive, self._run(send))
        finally:
            self._starting.cancel()
            self._on_end(self._generation, outcome)

    async def _run(self, send: Send) -> str:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        outcome = "completed"
        if self._starting.done():  # else a sign of life is overdue
            self._last_write = asyncio.get_running_loop().time()
        keeping_alive = asyncio.create_task(self._keep_alive(send))
        try:
            head = await self._starting
            await self._write(send, [chunk for delta in head for chunk in self._chunks(delta)])
            async for delta in self._generation.deltas():
                await self._write(send, self._chunks(delta))
            if self._generation.request.include_usage:
                await self._write(send, [self._writer.usage_chunk(self._generation.usage())])
            last = b"data: [DONE]\n\n"
        except DiptychError as error:
            log.error("%s failed in mid-stream: %s (%s)", self._generation.request.request_id, error, error.code)
            last, outcome = _event(error_body(error)), outcome_of(error)
        except ClientGone:
            raise
        except Exception:
            log.exception("%s failed in mid-stream", self._generation.request.request_id)
            last, outcome = _event(error_body(INTERNAL_ERROR)), "failed"
        finally:
            keeping_alive.cancel()
        await send({"type": "http.response.body", "body": last, "more_body": False})
        return outcome

    def _chunks(self, delta: Delta) -> list[dict[str, Any]]:
        usage = self._generation.usage() if self._generation.request.continuous_usage else None
        return self._writer.chunks(delta, usage)

    async def _keep_alive(self, send: Send) -> None:
        """A comment whenever nothing was written for a while, until cancelled. A client that does not even read
        those is noticed by whoever writes next, or by the kernel."""
        loop, interval = asyncio.get_running_loop(), self._settings.keep_alive_seconds
        with contextlib.suppress(ClientGone):
            while True:
                idle = loop.time() - self._last_write
                if idle >= interval:
                    await self._send(send, KEEP_ALIVE)
                else:
                    await asyncio.sleep(interval - idle)

    async def _write(self, send: Send, chunks: Sequence[dict[str, Any]]) -> None:
        """Raises ClientGone if the client does not read."""
        if chunks:
            await self._send(send, b"".join(map(_event, chunks)))

    async def _send(self, send: Send, body: bytes) -> None:
        self._last_write = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._settings.write_timeout):
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except TimeoutError:
            raise ClientGone from None


def outcome_of(error: BaseException) -> str:
    """The name under which the metrics count a request that ended with this exception."""
    if isinstance(error, OverloadedError):
        return "overloaded"
    if isinstance(error, RequestError):
        return "refused"
    return "cancelled" if isinstance(error, ClientGone | ClientDisconnect | asyncio.CancelledError) else "failed"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(content)
