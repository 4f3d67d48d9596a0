"""An open-loop load client for OpenAI-style streams of completions.

Requests leave when they are due, whatever has become of the earlier ones. The client shares its cores
with what it measures, so it does as little as possible while it runs: bodies are encoded beforehand,
bytes are kept as they arrive with the time of their arrival, and parsed when the run is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from diptych.bench.metrics import Outcome
from diptych.core.timeline import Timeline

READ_TIMEOUT = 120.0  # seconds without a byte after which a request has failed
EVENT_END = b"\n\n"
DATA = b"data: "
DONE = b"[DONE]"

clock = time.perf_counter


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A request of `num_prompt_tokens` tokens for exactly `num_output_tokens`; `body` is its JSON."""

    body: bytes
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(slots=True)
class Exchange:
    """A request, and all that came back: each piece of the body with the time of its arrival."""

    request: LoadRequest
    due: float
    sent: float | None = None
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    finished: float | None = None
    failure: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class StreamContent:
    """What the events of a stream say. `token_times[i]` is when the chunk with token i had arrived."""

    token_times: list[float] = field(default_factory=list)
    error: str | None = None
    done: bool = False


def completion_request(model: str, prompt: Sequence[int], num_output_tokens: int) -> LoadRequest:
    """A greedy streamed completion of token ids that neither an end token nor a stop string ends early."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": num_output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    return LoadRequest(json.dumps(body).encode(), len(prompt), num_output_tokens)


class LoadClient:
    """Sends exchanges to one server, with a key if it needs one. Use as an async context manager."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self._url = f"{base_url}/v1/completions"
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> LoadClient:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=READ_TIMEOUT)
        # Without a limit: a client that waits for a free connection is not open-loop.
        self._session = aiohttp.ClientSession(
            timeout=timeout, connector=aiohttp.TCPConnector(limit=0), headers=self._headers
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def send(self, exchange: Exchange) -> None:
        """Perform the exchange. Failures are recorded in it, not raised."""
        assert self._session is not None
        exchange.sent = clock()
        try:
            async with self._session.post(self._url, data=exchange.request.body) as response:
                exchange.headers = {name.lower(): value for name, value in response.headers.items()}
                if response.status != 200:
                    exchange.failure = f"HTTP {response.status} {_error_code(await response.read())}".strip()
                async for piece in response.content.iter_any():
                    exchange.pieces.append((clock(), piece))
        except TimeoutError:
            exchange.failure = "timeout"
        except (aiohttp.ClientError, OSError) as error:
            exchange.failure = f"connection: {type(error).__name__}"
        exchange.finished = clock()

    async def send_all(self, requests: Iterable[LoadRequest]) -> list[Exchange]:
        """Send all at once and wait for them (to warm a server up)."""
        exchanges = [Exchange(request, clock()) for request in requests]
        await asyncio.gather(*map(self.send, exchanges))
        return exchanges

    async def offer(self, requests: Sequence[LoadRequest], arrivals: Sequence[float]) -> list[Exchange]:
        """Send each request when it is due (`arrivals`: seconds from now); returns when all have ended."""
        start = clock()
        exchanges = [Exchange(request, start + arrival) for request, arrival in zip(requests, arrivals, strict=True)]
        async with asyncio.TaskGroup() as group:
            for exchange in exchanges:
                await asyncio.sleep(exchange.due - clock())
                group.create_task(self.send(exchange))
        return exchanges

    @contextlib.asynccontextmanager
    async def streaming(self, requests: Sequence[LoadRequest]) -> AsyncIterator[list[Exchange]]:
        """Keep one stream per request running while the context lasts, then cut them off.

        A stream that reaches its end is begun again; one that fails is not. Yields the list in which all
        their exchanges appear; those that were cut off have no `finished`.
        """
        exchanges: list[Exchange] = []

        async def keep_running(request: LoadRequest) -> None:
            while True:
                exchange = Exchange(request, clock())
                exchanges.append(exchange)
                await self.send(exchange)
                if not _ended_well(exchange):
                    return

        tasks = [asyncio.create_task(keep_running(request)) for request in requests]
        try:
            yield exchanges
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def read_stream(pieces: Iterable[tuple[float, bytes]]) -> StreamContent:
    """Parse the pieces of a stream of server-sent events.

    A token's time is that of the piece which completed its event. An event with several tokens gives all
    of them that one time. Anything that is not an event of a completion is an error.
    """
    content = StreamContent()
    rest = b""
    for when, piece in pieces:
        *events, rest = (rest + piece).split(EVENT_END)
        for event in events:
            _read_event(event, when, content)
    if rest.strip():
        content.error = content.error or "malformed event"
    return content


def outcome_of(exchange: Exchange) -> Outcome:
    """Judge an exchange: by its content, not by its status line.

    One without `finished` was cut off by us: what it has is not held against what it should have.
    """
    content = read_stream(exchange.pieces)
    timeline = Timeline(arrived=exchange.due)
    for when in content.token_times:
        timeline.token(when)
    timeline.finished = exchange.finished
    return Outcome(
        timeline=timeline,
        lag=max(0.0, (exchange.sent or exchange.due) - exchange.due),
        num_prompt_tokens=exchange.request.num_prompt_tokens,
        failure=_failure(exchange, content),
        route=_route_kind(exchange.headers.get("x-diptych-route", "")),
        server_timing=parse_server_timing(exchange.headers.get("server-timing", "")),
    )


def parse_server_timing(header: str) -> dict[str, float]:
    """Milliseconds by name, from a Server-Timing header (W3C): `queue;dur=1.5, prefill;dur=240`."""
    return {name: float(value) for name, value in re.findall(r"([\w-]+);dur=([\d.]+)", header)}


def _ended_well(exchange: Exchange) -> bool:
    """Whether the stream has its `[DONE]`: judged by its last bytes, since parsing would hold up the others."""
    last = b"".join(piece for _, piece in exchange.pieces[-2:])
    return exchange.failure is None and last.endswith(DATA + DONE + EVENT_END)


def _failure(exchange: Exchange, content: StreamContent) -> str | None:
    if exchange.failure is not None:
        return exchange.failure
    if content.error is not None:
        return f"stream: {content.error}"
    if exchange.finished is None:
        return None
    if not content.done:
        return "stream: truncated"
    missing = exchange.request.num_output_tokens - len(content.token_times)
    return f"tokens: {missing} missing" if missing else None


def _read_event(event: bytes, when: float, content: StreamContent) -> None:
    if event.startswith(b":"):
        return  # a comment: a sign of life
    data = event.removeprefix(DATA)
    if data == DONE:
        content.done = True
        return
    chunk = _parse_object(data)
    if "error" in chunk:
        content.error = _code_of(chunk)
        return
    try:
        content.token_times += [when for choice in chunk["choices"] for _ in choice["token_ids"]]
    except (KeyError, TypeError):
        content.error = content.error or "malformed event"


def _parse_object(data: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        parsed = json.loads(data)
        if isinstance(parsed, dict):
            return parsed
    return {}


def _error_code(body: bytes) -> str:
    return _code_of(_parse_object(body))


def _code_of(body: dict[str, Any]) -> str:
    error = body.get("error")
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


def _route_kind(header: str) -> str:
    """`split` or `local`, from x-diptych-route; empty for a server that does not say."""
    if "prefill=" in header:
        return "split"
    return "local" if "local=" in header else ""
