"""Whose prompt a worker computes next: tenants share its steps by their weights, whatever each of them has brought.

Start-time fair queueing (Goyal, Vin, Cheng 1996), but in order of finish. Each prompt has a start and a turn, in tokens
that a tenant of weight 1 has got: it starts where its tenant's last prompt ends, and its turn is where it ends itself.
Prompts are computed in order of their turns, so whoever brings little goes first, and whoever brings much waits for its
own prompts; within a tenant that is the order of arrival.

Virtual time is how far those have come that want more than they get. Whoever has got less since starts behind it, by
`credit` at most: so a tenant that stays below its share may come with several prompts at once, and be served at once.

A turn is fixed when its prompt comes. Of every other tenant no more goes before it than lies between virtual time
(less the credit) and that turn, and one prompt. So nobody starves.
"""

from __future__ import annotations

import math

from diptych.core.request import Request

MAX_TENANTS = 1024  # that are remembered; a forgotten one has its whole credit


class FairTurns:
    """Hands out turns. Remembers those tenants only that have used up credit.

    Args:
        credit: in tokens of a tenant of weight 1.
    """

    def __init__(self, credit: float) -> None:
        self._credit = credit
        self._virtual = 0.0
        self._ends: dict[str, float] = {}  # of each tenant's last prompt; who came last is last

    def start(self, tenant: str) -> float:
        """Where this tenant's next prompt starts."""
        return max(self._virtual - self._credit, self._ends.get(tenant, -math.inf))

    def turn(self, request: Request, tokens: int) -> float:
        """That of a prompt of which so many tokens are to be computed, and which comes now. Less is sooner."""
        turn = self.start(request.tenant) + tokens / request.weight
        self._ends.pop(request.tenant, None)
        self._ends[request.tenant] = turn
        if len(self._ends) > MAX_TENANTS:
            del self._ends[next(iter(self._ends))]
        return turn

    def reached(self, position: float) -> None:
        """Everybody who wants more has come so far (see `is_behind`)."""
        if position > self._virtual:
            self._virtual = position
            oldest = position - self._credit
            self._ends = {tenant: end for tenant, end in self._ends.items() if end > oldest}

    def is_behind(self, position: float) -> bool:
        """Whether a tenant has got less than others lately. Its position is the turn of its first prompt, less what is
        still to be computed of that by its weight."""
        return position < self._virtual

    @property
    def are_shared(self) -> bool:
        """Several tenants have had prompts here lately."""
        return len(self._ends) > 1
