"""The two routes that generate: from an HTTP request to an answer or a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive

from diptych.core.errors import DiptychError, RequestError
from diptych.core.ports import Dispatcher
from diptych.core.request import Preference
from diptych.front.answers import ChatAnswer, CompletionAnswer
from diptych.front.choice import Delta
from diptych.front.disconnect import while_connected
from diptych.front.errors import json_response
from diptych.front.event_stream import EventStream, outcome_of
from diptych.front.generation import Generation
from diptych.front.json_body import printable, read_json_object
from diptych.front.openai_request import Caller, GenerationRequest, RequestBuilder
from diptych.front.settings import MAX_RACE, MIN_CHECKPOINT_TOKENS, FrontSettings
from diptych.front.tenants import NOBODY, Tenant
from diptych.front.tokenizer import TextCodec
from diptych.telemetry.prometheus import ServerMetrics

TIMEOUT_HEADER = "x-request-timeout-ms"
RACE_HEADER = "x-diptych-race"
CHECKPOINT_HEADER = "x-diptych-checkpoint"
MAX_HEADER_DIGITS = 10  # of milliseconds: four months
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
            caller = caller_of(http, self._settings)
            self._dispatcher.check(caller.tenant.name)  # nothing is read in vain
            request = await build(await read_json_object(http, self._settings), caller)
            generation = Generation(request, self._dispatcher, self._codec)
        except BaseException as error:
            self._metrics.request_ended(outcome_of(error))
            if isinstance(error, DiptychError):
                self._metrics.refused(error.code)
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
        """Send nothing before the first tokens, so that what fails until then keeps its status code; unless that
        takes so long that a sign of life is due."""
        starting = asyncio.create_task(generation.start())
        try:
            await while_connected(receive, self._wait_for(starting))
        except BaseException:
            starting.cancel()
            raise
        writer = writer_for(generation.request, self._codec)
        return EventStream(generation, writer, starting, self._settings, self._end)

    async def _wait_for(self, starting: asyncio.Task[list[Delta]]) -> None:
        """Until the first tokens are there, but not for too long. Raises what they raise."""
        done, _ = await asyncio.wait({starting}, timeout=self._settings.keep_alive_seconds)
        if done:
            starting.result()

    def _end(self, generation: Generation, outcome: str) -> None:
        generation.cancel()
        self._metrics.in_flight.dec()
        self._metrics.request_ended(outcome)
        self._metrics.tenant_request(generation.request.requests[0].tenant)
        self._metrics.tokens(generation.num_prompt_tokens, generation.num_cached_tokens, generation.num_output_tokens)
        for timeline in generation.timelines():
            self._metrics.timeline(timeline)


def writer_for(request: GenerationRequest, codec: TextCodec) -> ChatAnswer | CompletionAnswer:
    return ChatAnswer(request, codec) if request.chat else CompletionAnswer(request, codec)


def caller_of(http: HttpRequest, settings: FrontSettings) -> Caller:
    """Raises RequestError for a header of ours that makes no sense."""
    tenant: Tenant = http.scope.get("state", {}).get("tenant", NOBODY)
    return Caller(
        tenant=tenant,
        prefer=_preference(http),
        timeout=_timeout(http),
        checkpoint_tokens=_checkpoint_tokens(http, settings),
        race=_number(http, RACE_HEADER, f"a number from 1 to {MAX_RACE}", lambda number: 1 <= number <= MAX_RACE),
    )


def _preference(http: HttpRequest) -> Preference:
    name = http.headers.get("x-diptych-prefer")
    if name is None:
        return Preference.AUTO
    if name not in PREFERENCES:
        message = f"x-diptych-prefer is split or local, not {printable(name)!r}"
        raise RequestError(message, param="x-diptych-prefer", code="invalid_value")
    return PREFERENCES[name]


def _timeout(http: HttpRequest) -> float | None:
    """Seconds that the client gives the whole answer."""
    milliseconds = _number(http, TIMEOUT_HEADER, "a whole number of milliseconds above 0", lambda number: number > 0)
    return None if milliseconds is None else milliseconds / 1000


def _checkpoint_tokens(http: HttpRequest, settings: FrontSettings) -> int | None:
    """After how many tokens the stream's KV is copied to another worker."""
    meaning = f"a number of tokens, at least {MIN_CHECKPOINT_TOKENS}, or 0 for no copies"
    tokens = _number(http, CHECKPOINT_HEADER, meaning, lambda number: number == 0 or number >= MIN_CHECKPOINT_TOKENS)
    if tokens and not settings.copies:
        message = f"{CHECKPOINT_HEADER}: this server keeps no copies, since its prefix cache is off"
        raise RequestError(message, param=CHECKPOINT_HEADER, code="unsupported_parameter")
    return tokens


def _number(http: HttpRequest, header: str, meaning: str, accepts: Callable[[int], bool]) -> int | None:
    """Of a header, if there. Raises RequestError if it is not what it is meant to be."""
    text = http.headers.get(header)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_HEADER_DIGITS and accepts(int(text))):
        raise RequestError(f"{header} is {meaning}, not {printable(text)!r}", param=header, code="invalid_value")
    return int(text)
