"""Flags that are found raised at a planned moment."""

from __future__ import annotations


class RaisedAfter:
    """A core.ports.Flag: whoever looks at it finds it raised after so many looks."""

    def __init__(self, looks: int) -> None:
        self._looks_left = looks

    def is_set(self) -> bool:
        self._looks_left -= 1
        return self._looks_left < 0

    def wait(self, timeout: float | None = None) -> bool:
        """Takes no time."""
        return self.is_set()
