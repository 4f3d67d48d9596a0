"""Virtual time: a heap of what is still to happen, and the processes that it happens to."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

Happening = Callable[[], None]


class Kernel:
    """Runs happenings in order of time; of those at one moment, in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._heap: list[tuple[float, int, Happening]] = []
        self._planned = 0

    def after(self, seconds: float, happening: Happening) -> None:
        """Plan something, `seconds` from now."""
        self._planned += 1
        heapq.heappush(self._heap, (self.now + seconds, self._planned, happening))

    def step(self) -> bool:
        """Let the next thing happen; False if nothing is planned."""
        if not self._heap:
            return False
        self.now, _, happening = heapq.heappop(self._heap)
        self.steps += 1
        happening()
        return True


class Process:
    """Something that can be frozen and killed. What happens to it while it is frozen waits (in the kernel's
    buffers, if it were real); what happens to it when it is dead is lost."""

    def __init__(self) -> None:
        self.alive = True
        self.frozen = False
        self._missed: deque[Happening] = deque()

    def run(self, happening: Happening) -> None:
        """Now, later or never."""
        if not self.alive:
            return
        if self.frozen:
            self._missed.append(happening)
        else:
            happening()

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        """Go on where it stopped, with everything that has piled up."""
        self.frozen = False
        while self._missed and self.alive and not self.frozen:
            self._missed.popleft()()

    def die(self) -> None:
        self.alive = False
        self._missed.clear()
