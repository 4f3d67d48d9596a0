"""The two routes that generate: from an HTTP request to an answer or a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from diptych.core.errors import DiptychError, OverloadedError, RequestError
from diptych.core.ports import Dispatcher
from diptych.core.request import Preference
from diptych.front.answers import ChatAnswer, CompletionAnswer
from diptych.front.choice import Delta
from diptych.front.disconnect import ClientGone, while_connected
from diptych.front.errors import INTERNAL_ERROR, error_body, json_response
from diptych.front.generation import Generation
from diptych.front.json_body import printable, read_json_object
from diptych.front.openai_request import Caller, GenerationRequest, RequestBuilder
from diptych.front.settings import FrontSettings
from diptych.front.tokenizer import TextCodec
from diptych.telemetry.prometheus import ServerMetrics

log = logging.getLogger(__name__)

PREFERENCES = {"split": Preference.SPLIT, "local": Preference.LOCAL}


class GenerationRoutes:
    """Handlers of /v1/chat/completions and /v1/completions."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        codec: TextCodec,
        builder: RequestBuilder,
        settings: FrontSettings,
        metrics: ServerMetrics,
    ) -> None:
        self._dispatcher = dispatcher
        self._codec = codec
        self._builder = builder
        self._settings = settings
        self._metrics = metrics

    async def chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, self._builder.chat)

    async def completion(self, http: HttpRequest) -> Response:
        return await self._answer(http, self._builder.completion)

    async def _answer(
        self, http: HttpRequest, build: Callable[[dict[str, Any], Caller], Awaitable[GenerationRequest]]
    ) -> Response:
        try:
            request = await build(await read_json_object(http, self._settings), _caller(http))
            generation = Generation(request, self._dispatcher, self._codec)
        except BaseException as error:
            self._metrics.request_ended(outcome_of(error))
            raise
        self._metrics.in_flight.inc()
        work = self._begin_stream if request.stream else self._whole
        try:
            return await work(generation, http.receive)
        except BaseException as error:
            self._end(generation, outcome_of(error))
            raise

    async def _whole(self, generation: Generation, receive: Receive) -> Response:
        choices = await while_connected(receive, generation.collect())
        answer = writer_for(generation.request, self._codec).whole(choices, generation.usage())
        self._end(generation, "completed")
        return json_response(answer, headers=generation.headers())

    async def _begin_stream(self, generation: Generation, receive: Receive) -> Response:
        """Send nothing before the first tokens, so that what fails until then keeps its status code."""
        head = await while_connected(receive, generation.start())
        writer = writer_for(generation.request, self._codec)
        return EventStream(generation, writer, head, self._settings.write_timeout, self._end)

    def _end(self, generation: Generation, outcome: str) -> None:
        generation.cancel()
        self._metrics.in_flight.dec()
        self._metrics.request_ended(outcome)
        self._metrics.tokens(generation.num_prompt_tokens, generation.num_cached_tokens, generation.num_output_tokens)
        for timeline in generation.timelines():
            self._metrics.timeline(timeline)


class EventStream(Response):
    """Server-sent events (WHATWG HTML, "Server-sent events"), one per chunk, `[DONE]` last.

    A failure in the middle becomes an event with `error` and the stream ends without `[DONE]`, so that no
    client takes it for a complete answer.
    """

    def __init__(
        self,
        generation: Generation,
        writer: ChatAnswer | CompletionAnswer,
        head: Sequence[Delta],
        write_timeout: float,
        on_end: Callable[[Generation, str], None],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"} | generation.headers())
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self._generation = generation
        self._writer = writer
        self._head = head
        self._write_timeout = write_timeout
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "cancelled"
        try:
            with contextlib.suppress(ClientGone):
                outcome = await while_connected(receive, self._run(send))
        finally:
            self._on_end(self._generation, outcome)

    async def _run(self, send: Send) -> str:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        outcome = "completed"
        try:
            await self._write(send, [chunk for delta in self._head for chunk in self._chunks(delta)])
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
        await send({"type": "http.response.body", "body": last, "more_body": False})
        return outcome

    def _chunks(self, delta: Delta) -> list[dict[str, Any]]:
        usage = self._generation.usage() if self._generation.request.continuous_usage else None
        return self._writer.chunks(delta, usage)

    async def _write(self, send: Send, chunks: Sequence[dict[str, Any]]) -> None:
        """Raises ClientGone if the client does not read."""
        if not chunks:
            return
        try:
            async with asyncio.timeout(self._write_timeout):
                await send({"type": "http.response.body", "body": b"".join(map(_event, chunks)), "more_body": True})
        except TimeoutError:
            raise ClientGone from None


def writer_for(request: GenerationRequest, codec: TextCodec) -> ChatAnswer | CompletionAnswer:
    return ChatAnswer(request, codec) if request.chat else CompletionAnswer(request, codec)


def outcome_of(error: BaseException) -> str:
    """The name under which the metrics count a request that ended with this exception."""
    if isinstance(error, OverloadedError):
        return "overloaded"
    if isinstance(error, RequestError):
        return "refused"
    return "cancelled" if isinstance(error, ClientGone | ClientDisconnect | asyncio.CancelledError) else "failed"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(content)


def _caller(http: HttpRequest) -> Caller:
    name = http.headers.get("x-diptych-prefer")
    if name is not None and name not in PREFERENCES:
        message = f"x-diptych-prefer is split or local, not {printable(name)!r}"
        raise RequestError(message, param="x-diptych-prefer", code="invalid_value")
    prefer = Preference.AUTO if name is None else PREFERENCES[name]
    return Caller(prefer=prefer, cache_salt=http.scope.get("state", {}).get("tenant", ""))
