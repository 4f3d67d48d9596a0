"""Leaving in good order.

SIGTERM or SIGINT: the worker tells the router, which gives it no new work, has it hand its streams over to others, and
tells it to end once nobody needs it any more. A grace period bounds the wait; a second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal

from diptych.chaos.failpoints import failpoint
from diptych.wire import messages
from diptych.wire.channel import Channel

log = logging.getLogger(__name__)


class Departure:
    """What signals ask for: the first one to leave in good order, the next one to end at once."""

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        self.at_once = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal)

    def _on_signal(self) -> None:
        if self.wanted.is_set():
            self.at_once.set()
        self.wanted.set()

    async def take(self, channel: Channel[messages.ToWorker], grace: float) -> None:
        """Wait for the wish to leave, tell the router, and return when it has to end, done or not."""
        await self.wanted.wait()
        log.info("leaving: no new work, and %.0f s for what runs", grace)
        channel.send(messages.Leaving())
        failpoint("worker.draining")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self.at_once.wait()
