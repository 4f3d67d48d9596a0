"""A TCP proxy that spoils what it passes on: byte by byte, at a chosen place, in one direction or both.

    async with FaultProxy("127.0.0.1", 7000) as proxy:     callers go to proxy.port
        proxy.inflict(Spoil(Fault.FLIP, Direction.UP, after=1000, seed=1))
        ...
        proxy.heal()

`UP` is what callers say, `DOWN` what they are answered. Faults of streams (not of packets: TCP mends those) are of two
kinds. Some happen once for each `inflict`, `after` so many bytes in that direction counted from then: FLIP, DUPLICATE,
REORDER, LOSE, HALF_CLOSE, RESET. Others last until `heal`: DELAY, THROTTLE, PARTITION (nothing gets through, and
all of it does when it is over), BLACK_HOLE (what is sent meanwhile is gone; a connection that has lost something
this way breaks when it is over, as behind a firewall that has forgotten it).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Flag, StrEnum, auto

CHUNK_BYTES = 1 << 16
STEP_SECONDS = 0.05  # between two pieces of a throttled stream


class Fault(StrEnum):
    FLIP = "flip"  # one bit is inverted
    DUPLICATE = "duplicate"  # some bytes come twice
    REORDER = "reorder"  # two neighbouring pieces change places
    LOSE = "lose"  # some bytes do not come
    HALF_CLOSE = "half-close"  # this direction ends, the other goes on
    RESET = "reset"  # the connection breaks
    DELAY = "delay"  # everything comes `amount` seconds later
    THROTTLE = "throttle"  # `amount` bytes in a second
    PARTITION = "partition"
    BLACK_HOLE = "black hole"


LASTING = frozenset({Fault.DELAY, Fault.THROTTLE, Fault.PARTITION, Fault.BLACK_HOLE})


class Direction(Flag):
    UP = auto()
    DOWN = auto()
    BOTH = UP | DOWN


@dataclass(frozen=True, slots=True)
class Spoil:
    """What is to be done. `after` (bytes) says where a fault that happens once does so; which bit, and how many
    bytes, follows from `seed`. `amount`: seconds of delay, or bytes per second."""

    fault: Fault
    direction: Direction = Direction.BOTH
    after: int = 0
    amount: float = 0.0
    seed: int = 0


class FaultProxy:
    """Passes connections on to one address. Use as an async context manager; `port` is where it listens."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._spoil: Spoil | None = None
        self._countdown = 0  # bytes until a fault that happens once
        self._random = random.Random(0)
        self._healed = asyncio.Event()
        self._healed.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._deaf: list[_Pump] = []
        self._server: asyncio.Server | None = None
        self.port = 0
        self.connections = 0  # that have been passed on
        self.struck = asyncio.Event()  # something has been spoiled since the last `inflict`

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def inflict(self, spoil: Spoil) -> None:
        """From now on, on all connections, in place of what was inflicted before."""
        self.heal()
        self.struck.clear()
        self._spoil, self._countdown, self._random = spoil, spoil.after, random.Random(spoil.seed)
        if spoil.fault is Fault.PARTITION:
            self._healed.clear()

    def heal(self) -> None:
        """Pass everything on as it is."""
        self._spoil = None
        self._healed.set()
        deaf, self._deaf = self._deaf, []
        for pump in deaf:
            pump.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            async with _connection(*self._target) as (target_reader, target_writer):
                self.connections += 1
                pumps = (
                    _Pump(self, Direction.UP, reader, target_writer),
                    _Pump(self, Direction.DOWN, target_reader, writer),
                )
                await asyncio.gather(*(pump.run() for pump in pumps))
        writer.transport.abort()

    # for the pumps

    async def apply(self, pump: _Pump, chunk: bytes) -> None:
        """Pass a chunk on, or what is made of it."""
        spoil = self._spoil
        if spoil is None or not pump.direction & spoil.direction:
            await pump.send(chunk)
        elif spoil.fault in LASTING:
            self.struck.set()
            await self._hold_up(pump, spoil, chunk)
        elif self._countdown >= len(chunk):
            self._countdown -= len(chunk)
            await pump.send(chunk)
        else:
            place, self._spoil = self._countdown, None  # it happens once
            self.struck.set()
            await pump.send(chunk[:place])
            await self._break(pump, spoil.fault, chunk[place:])

    async def _hold_up(self, pump: _Pump, spoil: Spoil, chunk: bytes) -> None:
        match spoil.fault:
            case Fault.DELAY:
                await asyncio.sleep(spoil.amount)
                await pump.send(chunk)
            case Fault.THROTTLE:
                size = max(1, int(spoil.amount * STEP_SECONDS))
                for start in range(0, len(chunk), size):
                    await asyncio.sleep(STEP_SECONDS)
                    await pump.send(chunk[start : start + size])
            case Fault.PARTITION:
                await self._healed.wait()
                await pump.send(chunk)
            case _:
                pump.deaf = True
                self._deaf.append(pump)

    async def _break(self, pump: _Pump, fault: Fault, rest: bytes) -> None:
        """`rest` (at least one byte) begins where the fault is to be."""
        length = self._random.randint(1, max(1, len(rest) // 2))
        match fault:
            case Fault.FLIP:
                flipped = rest[0] ^ (1 << self._random.randrange(8))
                await pump.send(bytes((flipped,)) + rest[1:])
            case Fault.DUPLICATE:
                await pump.send(rest[:length] + rest)
            case Fault.REORDER:
                await pump.send(rest[length : 2 * length] + rest[:length] + rest[2 * length :])
            case Fault.LOSE:
                await pump.send(rest[length:])
            case Fault.HALF_CLOSE:
                pump.end()
                pump.deaf = True
            case _:
                raise ConnectionResetError("the proxy breaks the connection")


class _Pump:
    """One direction of one connection. A deaf one takes everything and passes on nothing."""

    def __init__(
        self, proxy: FaultProxy, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.direction = direction
        self.deaf = False
        self._proxy = proxy
        self._reader = reader
        self._writer = writer

    async def run(self) -> None:
        """Until the sending side closes; OSError if the connection breaks."""
        while chunk := await self._reader.read(CHUNK_BYTES):
            if not self.deaf:
                await self._proxy.apply(self, chunk)
        if not self.deaf:
            self.end()

    async def send(self, data: bytes) -> None:
        if data:
            self._writer.write(data)
            await self._writer.drain()

    def abort(self) -> None:
        """Break the connection."""
        self._writer.transport.abort()

    def end(self) -> None:
        """Say that nothing more comes."""
        if not self._writer.is_closing():
            self._writer.write_eof()


@contextlib.asynccontextmanager
async def _connection(host: str, port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
