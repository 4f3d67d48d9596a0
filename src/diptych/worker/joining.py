"""The lives of a worker that nobody here supervises: it joins a router, on this host or another, and

- SIGTERM or SIGINT: leaves (`worker.departure`);
- the router is gone: goes on trying to join again, in a new life (epoch), until its patience is at an end.
  The model stays loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from diptych.core.clock import WallClock
from diptych.core.errors import ConfigError, HandshakeError, PeerError, in_words
from diptych.core.fleet import Epoch
from diptych.core.ports import Engine
from diptych.core.settings import WorkerSettings
from diptych.policy.backoff import Backoff
from diptych.wire import messages
from diptych.wire.channel import StreamChannel, connect
from diptych.worker.departure import Departure
from diptych.worker.main import End, Loaded, OnProgress, load_engine, serve

log = logging.getLogger(__name__)

EPOCH_SECONDS = 10.0  # for the router's first answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds: how long running requests may take when the worker leaves, and how long a router may be gone."""

    grace: float = 30.0
    rejoin: float = 300.0


async def run_joined(settings: WorkerSettings, load: Callable[[OnProgress], Engine], patience: Patience) -> None:
    """Live one life after another. Returns at an orderly end; raises DiptychError with the reason otherwise.

    The epoch in `settings` is not used: the router gives one for each life."""
    departure = Departure()
    clock = WallClock()
    backoff = Backoff(patience.rejoin, clock.now())
    epoch: Epoch = 0
    loaded: Loaded | None = None
    with contextlib.ExitStack() as stack:
        while not departure.wanted.is_set():
            try:
                channel, epoch = await _join(settings, epoch)
            except (OSError, PeerError) as error:
                if epoch == 0 and isinstance(error, PeerError):
                    raise  # it has never worked: the wrong key, or the wrong flags
                await _wait(settings, departure, backoff.failed(clock.now()), error)
                continue
            backoff.succeeded(clock.now())
            if loaded is None:
                loaded = await load_engine(settings, load, channel)
                stack.enter_context(contextlib.closing(loaded.engine))
            life = replace(settings, epoch=epoch, data_host=settings.data_host or channel.local_host)
            leaving = functools.partial(departure.take, channel, patience.grace)
            if await serve(life, loaded, channel, leaving) is not End.ROUTER_GONE:
                return
            log.warning("the router at %s is gone", settings.router)


async def _join(settings: WorkerSettings, last: Epoch) -> tuple[StreamChannel[messages.ToWorker], Epoch]:
    """A channel to the router, and the epoch that it gives to this life. Raises OSError or PeerError if there
    is no such router now, and ConfigError if it does not want this worker."""
    channel = await connect(settings.router, settings.key, messages.ToWorker)
    try:
        channel.send(messages.WantEpoch(settings.worker_id, last))
        async with asyncio.timeout(EPOCH_SECONDS):
            answer = await anext(channel, None)
        match answer:
            case messages.NewEpoch(epoch):
                return channel, epoch
            case messages.Refused(reason):
                raise ConfigError(f"the router refused this worker: {reason}")
            case _:
                raise HandshakeError("the router hung up")
    except BaseException:
        channel.close()
        raise


async def _wait(settings: WorkerSettings, departure: Departure, seconds: float | None, error: Exception) -> None:
    """Before the next try, unless it is time to leave. Raises ConfigError if there is to be none."""
    if seconds is None:
        raise ConfigError(f"no router at {settings.router}: {in_words(error)}")
    log.warning("cannot join %s (%s); trying again in %.2f s", settings.router, in_words(error), seconds)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await departure.wanted.wait()
