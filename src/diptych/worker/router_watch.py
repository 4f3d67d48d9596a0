"""Noticing that the router has fallen silent: the connection is there, but not even its pings come any more."""

from __future__ import annotations

import asyncio
import logging

from diptych.core.clock import Clock
from diptych.policy.pulse import Pulse

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 20.0
"""Without a word (a ping comes every second) the router counts as lost. That is far more than it grants a worker: a
worker that is given up costs its streams a pause, but a router that merely stood still would lose all its workers."""


class RouterWatch:
    """When the router was last heard of."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard = clock.now()
        self._pulse = Pulse(BEAT_SECONDS, self._heard)

    def heard(self) -> None:
        """Something has come from it."""
        self._heard = self._clock.now()

    async def until_silent(self) -> None:
        """Return once nothing has come for too long."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            if self.is_silent():
                log.warning("nothing has come from the router for %.0f s", SILENCE_SECONDS)
                return

    def is_silent(self) -> bool:
        """To be asked at every beat."""
        now = self._clock.now()
        if not self._pulse.beat(now):
            self._heard = now
        return now - self._heard > SILENCE_SECONDS
