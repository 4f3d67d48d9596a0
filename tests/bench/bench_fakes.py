"""A server that streams completions as it is told, and nothing more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

ROUTE = {"x-diptych-route": "prefill=prefill-0;decode=decode-0;transport=shm", "server-timing": "queue;dur=1.5"}


def event(token_ids: Sequence[int]) -> bytes:
    return b"data: %b\n\n" % json.dumps({"choices": [{"index": 0, "token_ids": list(token_ids)}]}).encode()


ERROR_EVENT = b'data: {"error": {"message": "worker lost", "type": "server_error", "code": "worker_lost"}}\n\n'
DONE_EVENT = b"data: [DONE]\n\n"


@dataclass(slots=True)
class FakeServer:
    """Answers each completion with its `max_tokens` tokens, `tokens_per_chunk` at a time, with `gap` seconds
    before each chunk. `fail_after` tokens it sends an error event; `refuse` is a status for every request."""

    gap: float = 0.0
    tokens_per_chunk: int = 1
    fail_after: int | None = None
    withhold: int = 0  # tokens that are not sent
    end_event: bytes = DONE_EVENT
    refuse: int | None = None
    bodies: list[dict[str, object]] = field(default_factory=list)
    ended: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))  # released per stream

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/v1/completions", self._complete, methods=["POST"])])

    async def _complete(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.bodies.append(body)
        if self.refuse is not None:
            return JSONResponse({"error": {"message": "no", "code": "queue_full"}}, self.refuse)
        return StreamingResponse(self._events(body["max_tokens"]), headers=ROUTE, media_type="text/event-stream")

    async def _events(self, num_tokens: int) -> AsyncIterator[bytes]:
        tokens = list(range(num_tokens - self.withhold))
        for start in range(0, len(tokens), self.tokens_per_chunk):
            if self.fail_after is not None and start >= self.fail_after:
                yield ERROR_EVENT
                break
            await asyncio.sleep(self.gap)
            yield event(tokens[start : start + self.tokens_per_chunk])
        else:
            yield self.end_event
        self.ended.release()
