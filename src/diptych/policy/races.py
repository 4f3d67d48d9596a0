"""Raced prefill: several workers begin with a prompt, and the stream goes on where the first token comes from.

Off unless a request asks for it (`Request.race`). Rivals are attempts of their own, on prefill workers of their own,
and are paid for like any other: loads and room count them. The first token of one makes it the stream's attempt; the
others end at once, in both pools. If the stream's own attempt fails before that, a rival takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from diptych.core.actions import RouterAction
from diptych.core.fleet import WorkerId
from diptych.core.timeline import Timeline
from diptych.policy.attempts import Attempts
from diptych.policy.live_request import LiveRequest, Rival
from diptych.policy.saturation import Room


class Races:
    """Starts rivals, and gives a stream to the one that wins."""

    def __init__(self, attempts: Attempts) -> None:
        self._attempts = attempts

    def start(self, stream: LiveRequest, room: Callable[[], Room], now: float) -> list[RouterAction]:
        """Begin with the rivals of a stream whose first attempt has just begun, as far as there is room for them."""
        actions: list[RouterAction] = []
        taken = [stream.prefiller]
        while len(stream.rivals) + 1 < stream.request.race:
            place = self._attempts.place(stream, avoid=[worker for worker in taken if worker is not None])
            if place is None or not room().takes(place.route, stream.prompt):
                break
            request = replace(stream.request, request_id=f"{stream.request.request_id}~race{len(taken)}")
            rival = LiveRequest(request, Timeline(arrived=now), now, shadow=Rival(stream))
            actions.append(self._attempts.begin(rival, place, now))
            stream.rivals.append(rival)
            taken.append(rival.prefiller)
        return actions

    def decide(self, winner: LiveRequest, now: float) -> tuple[LiveRequest, list[RouterAction]]:
        """A first token is here, of a stream or of a rival. Returns the stream, and how the others end."""
        if not isinstance(winner.shadow, Rival):
            rivals, winner.rivals = winner.rivals, []
            return winner, [action for rival in rivals for action in self._attempts.let_go(rival, now)]
        stream = winner.shadow.stream
        stream.rivals.remove(winner)
        return stream, self._promote(winner, stream, now)

    def replace(self, stream: LiveRequest, now: float, failed_on: WorkerId) -> list[RouterAction] | None:
        """Its own attempt has failed: one of the rivals takes its place; None if there is none."""
        for rival in stream.rivals:
            if self._attempts.are_there(rival.workers):
                stream.rivals.remove(rival)
                others, stream.rivals = stream.rivals, []
                actions = self._promote(rival, stream, now, failed_on)
                stream.rivals = others
                return actions
        return None

    def _promote(
        self, rival: LiveRequest, stream: LiveRequest, now: float, failed_on: WorkerId | None = None
    ) -> list[RouterAction]:
        actions = self._attempts.let_go(stream, now, failed_on)
        self._attempts.give(rival, stream)
        return actions
