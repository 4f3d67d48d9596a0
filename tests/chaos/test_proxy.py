"""The fault proxy: what comes out of it, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.chaos.proxy import Direction, Fault, FaultProxy, Spoil

SENT = bytes(range(256)) * 8


async def echo_through(run: Callable[[FaultProxy], Awaitable[bytes]]) -> bytes:
    """Run against a proxy before a server that sends everything back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1000):
            writer.write(chunk)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        return await run(proxy)


async def exchange(proxy: FaultProxy, data: bytes = SENT) -> bytes:
    """Send all, then read to the end; what had come if the connection breaks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    received = b""
    try:
        writer.write(data)
        writer.write_eof()
        while chunk := await reader.read(1000):
            received += chunk
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()
    return received


def spoiled(spoil: Spoil) -> bytes:
    async def run(proxy: FaultProxy) -> bytes:
        proxy.inflict(spoil)
        received = await exchange(proxy)
        assert proxy.struck.is_set()
        assert await exchange(proxy) == SENT  # it happens once
        return received

    return asyncio.run(echo_through(run))


def test_without_a_fault_nothing_changes() -> None:
    assert asyncio.run(echo_through(exchange)) == SENT


@settings(max_examples=20, deadline=None)
@given(st.integers(0, len(SENT) - 1), st.sampled_from([Direction.UP, Direction.DOWN, Direction.BOTH]), st.integers())
def test_one_bit(after: int, direction: Direction, seed: int) -> None:
    received = spoiled(Spoil(Fault.FLIP, direction, after=after, seed=seed))
    different = [place for place in range(len(SENT)) if received[place] != SENT[place]]
    assert len(received) == len(SENT)
    assert different == [after]
    assert (received[after] ^ SENT[after]).bit_count() == 1


@settings(max_examples=10, deadline=None)
@given(st.integers(0, len(SENT) - 1), st.integers())
def test_bytes_twice_and_bytes_lost(after: int, seed: int) -> None:
    twice = spoiled(Spoil(Fault.DUPLICATE, Direction.UP, after=after, seed=seed))
    extra = len(twice) - len(SENT)
    assert extra > 0
    assert twice == SENT[: after + extra] + SENT[after:]
    fewer = spoiled(Spoil(Fault.LOSE, Direction.UP, after=after, seed=seed))
    lost = len(SENT) - len(fewer)
    assert lost > 0
    assert fewer == SENT[:after] + SENT[after + lost :]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, len(SENT) - 500), st.integers())
def test_pieces_in_each_others_place(after: int, seed: int) -> None:
    received = spoiled(Spoil(Fault.REORDER, Direction.UP, after=after, seed=seed))
    assert sorted(received) == sorted(SENT)
    assert received[:after] == SENT[:after]


@pytest.mark.parametrize("fault", [Fault.HALF_CLOSE, Fault.RESET])
def test_the_end_in_the_middle(fault: Fault) -> None:
    received = spoiled(Spoil(fault, Direction.UP, after=700))
    assert received == SENT[: len(received)]
    assert len(received) == 700 if fault is Fault.HALF_CLOSE else len(received) <= 700


def test_a_partition_holds_everything_back_until_it_is_over() -> None:
    async def run(proxy: FaultProxy) -> bytes:
        proxy.inflict(Spoil(Fault.PARTITION, Direction.DOWN))
        exchanging = asyncio.create_task(exchange(proxy))
        await proxy.struck.wait()
        assert not exchanging.done()
        proxy.heal()
        return await exchanging

    assert asyncio.run(echo_through(run)) == SENT


def test_a_black_hole_gives_nothing_back_and_breaks_what_it_had() -> None:
    async def run(proxy: FaultProxy) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        proxy.inflict(Spoil(Fault.BLACK_HOLE, Direction.UP))
        writer.write(b"lost")
        await proxy.struck.wait()
        writer.write(b"lost, too")
        proxy.heal()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.transport.abort()
        return await exchange(proxy)

    assert asyncio.run(echo_through(run)) == SENT


@pytest.mark.parametrize("spoil", [Spoil(Fault.DELAY, amount=0.01), Spoil(Fault.THROTTLE, amount=20_000.0)], ids=str)
def test_slow_is_not_wrong(spoil: Spoil) -> None:
    async def run(proxy: FaultProxy) -> bytes:
        proxy.inflict(spoil)
        return await exchange(proxy)

    assert asyncio.run(echo_through(run)) == SENT
