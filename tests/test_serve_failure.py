"""What ends a server that cannot go on."""

from __future__ import annotations

import asyncio

import pytest

from diptych import serve
from diptych.core.errors import ConfigError
from diptych.fleet.local import LocalFleet


def test_a_router_whose_beat_breaks_down_ends_the_server() -> None:
    """Nobody would notice silent workers or deadlines any more."""

    async def beat() -> None:
        raise KeyError("a bug")

    async def run() -> None:
        await serve._failure(LocalFleet([]), asyncio.create_task(beat()))

    with pytest.raises(KeyError, match="a bug"):
        asyncio.run(run())


def test_so_does_a_worker_that_cannot_start() -> None:
    async def run() -> None:
        fleet = LocalFleet([])
        fleet.failed.set_result(ConfigError("no such model"))
        await serve._failure(fleet, asyncio.create_task(asyncio.sleep(100)))

    with pytest.raises(ConfigError, match="no such model"):
        asyncio.run(run())


def test_what_clients_could_not_be_served_with_is_known_before_workers_load() -> None:
    with pytest.raises(ConfigError, match="--checkpoint-tokens"):
        _ = serve.ServeSettings(http=serve.HttpSettings(checkpoint_tokens=3, served_model_names=("m",))).front
    with pytest.raises(ConfigError, match="--api-key"):
        _ = serve.ServeSettings(http=serve.HttpSettings(api_keys=("",), served_model_names=("m",))).front
    assert not serve.ServeSettings(
        http=serve.HttpSettings(served_model_names=("m",)), cache=serve.CacheSettings(prefix_caching=False)
    ).front.copies
