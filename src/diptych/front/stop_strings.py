"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on, but holds back an end that may yet become a stop string.

    Args:
        stops: non-empty strings; the one that is complete first wins, and of those the longest. So the result
            does not depend on where the text was cut into pieces.
        include: let the stop string itself through.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Returns the text that may be shown, and whether a stop string ended it."""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self._held = ""
            return text[: end if self._include else start], True
        cut = self._possible_start(text)
        self._held = text[cut:]
        return text[:cut], False

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        for position in range(max(0, len(text) - self._longest + 1), len(text)):
            end = text[position:]
            if any(stop.startswith(end) for stop in self._stops):
                return position
        return len(text)
