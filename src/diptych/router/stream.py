"""One accepted request as the front sees it: tokens as they come, then the end or an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from diptych.core.errors import DiptychError
from diptych.core.fleet import Route
from diptych.core.request import TokenOutput
from diptych.core.timeline import Timeline
from diptych.policy.live_request import LiveRequest


class RequestStream:
    """Implements core.ports.TokenStream. Fed by the router, read by one consumer.

    At most max_tokens items are ever queued, so a slow reader costs bounded memory.
    """

    def __init__(self, live: LiveRequest, cancel: Callable[[str], None]) -> None:
        self._live = live
        self._cancel = cancel
        self._items: asyncio.Queue[TokenOutput | DiptychError] = asyncio.Queue()
        self._over = False

    @property
    def route(self) -> Route | None:
        return self._live.route

    @property
    def num_cached_tokens(self) -> int:
        return self._live.num_cached_tokens

    @property
    def timeline(self) -> Timeline:
        return self._live.timeline

    def put(self, item: TokenOutput | DiptychError) -> None:
        """The router has something for the client."""
        self._items.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        while not self._over:
            item = await self._items.get()
            if isinstance(item, DiptychError):
                self._over = True
                raise item
            self._over = item.finish is not None
            yield item

    def cancel(self) -> None:
        """Stop in all pools. Idempotent; harmless after the end."""
        if not self._over:
            self._over = True
            self._cancel(self._live.request.request_id)
