"""One client request in flight: its streams below, its choices above."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from diptych.core.errors import ServingError
from diptych.core.ports import Dispatcher, TokenStream
from diptych.core.timeline import Timeline
from diptych.front.choice import Choice, Delta
from diptych.front.openai_request import GenerationRequest
from diptych.front.stop_strings import StopStrings
from diptych.front.tokenizer import TextCodec

EVENTS_AHEAD = 4  # per choice: a slow client holds back its own choices, and nobody else's


class Generation:
    """Submits a request per choice and merges what comes back. `cancel` it at the end, however it ends.

    Raises (constructor):
        OverloadedError, UnavailableError: not all choices were accepted; then none is.
    """

    def __init__(self, request: GenerationRequest, dispatcher: Dispatcher, codec: TextCodec) -> None:
        self.request = request
        self.choices = [
            Choice(i, core, codec, StopStrings(request.stops, request.include_stop), len(request.echo_of(i)))
            for i, core in enumerate(request.requests)
        ]
        self._streams: list[TokenStream] = []
        self._pumps: list[asyncio.Task[None]] = []
        try:
            for core in request.requests:
                self._streams.append(dispatcher.submit(core))
        except BaseException:
            self.cancel()
            raise
        self._deltas = self._merge() if len(self._streams) > 1 else self._follow(0)

    async def start(self) -> list[Delta]:
        """Wait for the first token of every choice, when all routes are known. Returns what has come by then."""
        waiting, head = set(range(len(self.choices))), []
        async for delta in self._deltas:
            head.append(delta)
            waiting.discard(delta.index)
            if not waiting:
                break
        return head

    async def deltas(self) -> AsyncIterator[Delta]:
        """What comes (after `start`), in order within each choice. Raises DiptychError if one cannot go on."""
        async for delta in self._deltas:
            yield delta

    async def collect(self) -> list[Delta]:
        """Every choice to its end."""
        grown: list[list[Delta]] = [[] for _ in self.choices]
        async for delta in self._deltas:
            grown[delta.index].append(delta)
        return [Delta.joined(deltas) for deltas in grown]

    def cancel(self) -> None:
        """Stop whatever still runs. Idempotent."""
        for pump in self._pumps:
            pump.cancel()
        for stream in self._streams:
            stream.cancel()

    def headers(self) -> dict[str, str]:
        """What is known of route and time, at this moment; a choice that waits for its turn has no route."""
        routes = (stream.route for stream in self._streams)
        names = ", ".join(route.header() for route in routes if route is not None)
        phases = self._streams[0].timeline.server_timing()
        timing = ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in phases.items())
        headers = {"x-diptych-route": names} if names else {}
        if timing:
            headers["server-timing"] = timing
        if self.request.ignored:
            headers["x-diptych-ignored"] = ", ".join(self.request.ignored)
        return headers

    def timelines(self) -> list[Timeline]:
        return [stream.timeline for stream in self._streams]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.request.prompts))

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the cache; of the n choices of a prompt the first one counts."""
        return sum(stream.num_cached_tokens for stream in self._streams[:: self.request.n])

    @property
    def num_output_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }

    async def _follow(self, index: int) -> AsyncIterator[Delta]:
        stream, choice = self._streams[index], self.choices[index]
        async for output in stream:
            delta = choice.add(output)
            if delta.finish is not None and output.finish is None:
                stream.cancel()  # a stop string ended it; the workers do not know
            yield delta
            if delta.finish is not None:
                return
        raise ServingError("the stream ended before its last token", code="stream_truncated")

    async def _merge(self) -> AsyncIterator[Delta]:
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue(EVENTS_AHEAD * len(self._streams))
        self._pumps = [asyncio.create_task(self._pump(i, queue)) for i in range(len(self._streams))]
        running = len(self._streams)
        while running:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            running -= event.finish is not None
            yield event

    async def _pump(self, index: int, queue: asyncio.Queue[Delta | Exception]) -> None:
        try:
            async for delta in self._follow(index):
                await queue.put(delta)
        except Exception as error:
            await queue.put(error)
