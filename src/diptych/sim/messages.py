"""What router and workers say to each other, beyond what are events already (as in `wire.messages`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from diptych.core.fleet import WorkerStats
from diptych.core.request import Request

if TYPE_CHECKING:
    from diptych.sim.life import Life


class Hello(NamedTuple):
    """A life introduces itself."""

    life: Life


class Load(NamedTuple):
    """What a worker reports when its load has changed."""

    stats: WorkerStats


class Leaving(NamedTuple):
    """No new work, please."""


class Prefill(NamedTuple):
    request: Request
    output_token_ids: tuple[int, ...]
    ticket: bytes
    target: Life  # whose endpoint it is


class WarmUp(NamedTuple):
    """Open a data connection before the first request needs it."""

    target: Life


class Shutdown(NamedTuple):
    """End."""


class Over(NamedTuple):
    """Not a real message, but a mark in the stream of orders: all that the router had to say about a request has
    been said by now. Behind it, nobody should be working for that request."""

    request_id: str
