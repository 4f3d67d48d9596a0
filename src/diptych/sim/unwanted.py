"""Rows of a step that become unwanted at a planned moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable

LetGo = Callable[[tuple[str, ...]], None]


class PlannedUnwanted:
    """A core.ports.Unwanted: these requests, of which whoever asks hears after so many questions."""

    def __init__(self, request_ids: Iterable[str], questions: int = 0, let_go: LetGo = lambda _: None) -> None:
        self._request_ids = frozenset(request_ids)
        self._questions_left = questions
        self._let_go = let_go

    def take(self) -> frozenset[str]:
        """All of them at once, and then no more."""
        self._questions_left -= 1
        return self._request_ids if self._questions_left == -1 else frozenset()

    def let_go(self, request_ids: Iterable[str]) -> None:
        self._let_go(tuple(request_ids))

    def wait(self, seconds: float) -> None:
        """Takes no time."""
