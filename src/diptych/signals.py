"""What the operator of `diptych serve` says with signals."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable


class OperatorSignals:
    """SIGTERM sets `drain`: end in good order. SIGINT, a second SIGTERM, or a terminal that hangs up set `stop`, too:
    end now."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGTERM, self._end)
        self._loop.add_signal_handler(signal.SIGINT, self._end_now)
        self._loop.add_signal_handler(signal.SIGHUP, self._end_now)

    def on_hangup(self, call: Callable[[], None]) -> None:
        """From now on SIGHUP means `call`, as with other daemons, unless there is a terminal that can hang up."""
        if not sys.stderr.isatty():
            self._loop.add_signal_handler(signal.SIGHUP, call)

    def _end(self) -> None:
        if self.drain.is_set():
            self.stop.set()
        self.drain.set()

    def _end_now(self) -> None:
        self.drain.set()
        self.stop.set()
