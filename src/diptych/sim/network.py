"""Connections: ordered and reliable like TCP, until somebody cuts, slows or disturbs them.

A partition stalls what is on its way; it ends nothing by itself (who gives up waiting, does). The end of a
connection is a message like any other, behind those that were sent before it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from diptych.sim.kernel import Kernel

Place = str  # a worker's name, or ROUTER
ROUTER: Place = "router"
Way = tuple[Place, Place]


class Network:
    """Who reaches whom, and how fast."""

    def __init__(self, kernel: Kernel, rng: random.Random, latency: float) -> None:
        self.kernel = kernel
        self._random = rng
        self._latency = latency
        self._cut: Counter[Way] = Counter()
        self._slow: dict[Way, float] = {}
        self._unruly: Counter[Way] = Counter()
        self._pipes: dict[Way, list[Pipe]] = {}

    def pipe(self, sender: Place, receiver: Place, deliver: Callable[[object], None], *, data: bool = False) -> Pipe:
        """A new connection's one direction. Data pipes can be made unruly."""
        made = Pipe(self, (sender, receiver), deliver, data)
        pipes = self._pipes.setdefault(made.way, [])
        pipes[:] = [pipe for pipe in pipes if not pipe.over]
        pipes.append(made)
        return made

    def is_cut(self, way: Way) -> bool:
        return self._cut[way] > 0

    def cut(self, way: Way) -> None:
        """Nothing gets from the one to the other."""
        self._cut[way] += 1

    def heal(self, way: Way) -> None:
        """Undo one `cut`; what has piled up goes on."""
        self._cut[way] -= 1
        if not self._cut[way]:
            for pipe in self._pipes.get(way, ()):
                pipe.pump()

    def slow_down(self, way: Way, seconds: float) -> None:
        """Everything takes so much longer from now on; 0 for as usual."""
        self._slow[way] = seconds

    def disturb(self, way: Way, by: int) -> None:
        """With 1, frames of data connections double and overtake each other; -1 takes that back."""
        self._unruly[way] += by

    def is_unruly(self, way: Way) -> bool:
        return self._unruly[way] > 0

    def latency(self, way: Way) -> float:
        """Of one message, in seconds."""
        return self._latency * (0.5 + self._random.random()) + self._slow.get(way, 0.0)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def below(self, bound: int) -> int:
        return self._random.randrange(bound)


@dataclass(slots=True, eq=False)
class End:
    """The last thing that a connection says."""


class Pipe:
    """One direction of one connection."""

    def __init__(self, network: Network, way: Way, deliver: Callable[[object], None], data: bool) -> None:
        self.way = way
        self.over = False  # nothing more will be delivered
        self._closed = False  # nothing more is taken in
        self._network = network
        self._deliver = deliver
        self._data = data
        self._queue: deque[tuple[float, object]] = deque()
        self._pumping = False

    def send(self, message: object) -> None:
        """Put something on its way; after the end, nothing happens."""
        if self._closed:
            return
        network = self._network
        self._queue.append((network.kernel.now + network.latency(self.way), message))
        if self._data and network.is_unruly(self.way) and not isinstance(message, End):
            if network.chance(0.2):
                self._queue.append(self._queue[-1])
            if len(self._queue) > 1 and network.chance(0.3):
                self._queue[-1], self._queue[-2] = self._queue[-2], self._queue[-1]
        self.pump()

    def end(self) -> None:
        """Hang up, behind everything that was sent."""
        self.send(End())
        self._closed = True

    def break_off(self) -> None:
        """The sender is dead: some of what it sent last gets lost, then comes the end."""
        if self._closed:
            return
        keep = self._network.below(len(self._queue) + 1)
        while len(self._queue) > keep:
            self._queue.pop()
        self.end()

    def drop(self) -> None:
        """The receiver is dead."""
        self._closed = self.over = True
        self._queue.clear()

    def pump(self) -> None:
        """Plan the delivery of what is first in line, unless the way is cut."""
        if self._queue and not self._pumping and not self._network.is_cut(self.way):
            self._pumping = True
            kernel = self._network.kernel
            kernel.after(max(0.0, self._queue[0][0] - kernel.now), self._arrive)

    def _arrive(self) -> None:
        self._pumping = False
        if not self._queue or self._network.is_cut(self.way):
            return
        _, message = self._queue.popleft()
        if isinstance(message, End):
            self.over = True
        self.pump()
        self._deliver(message)
