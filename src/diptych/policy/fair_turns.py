"""Whose prompt a worker computes next: tenants share its steps evenly, whatever each of them has brought.

Weighted fair queueing with equal weights (Demers, Keshav, Shenker 1989): imagine that every tenant with a prompt here
got an equal share of each step. A prompt's turn is when it would be finished then, in tokens that each tenant has got,
and prompts are computed in order of their turns. So whoever brings little goes first, and whoever brings much waits
for its own prompts. Within a tenant that is the order of arrival.

A turn is fixed when its prompt comes. Before it go only prompts that would have been finished earlier: of every other
tenant no more tokens than lie between the prompt's arrival and its turn. Nobody starves.
"""

from __future__ import annotations


class FairTurns:
    """Hands out turns. Remembers those tenants only that are ahead of their share."""

    def __init__(self) -> None:
        self._virtual = 0.0  # tokens that each tenant has got, if it always wanted some
        self._last: dict[str, float] = {}  # the last turn of tenants whose last turn is still to come

    def turn(self, tenant: str, tokens: int) -> float:
        """When a prompt of that many tokens, which comes now, is due. Less is sooner."""
        turn = max(self._virtual, self._last.get(tenant, 0.0)) + tokens
        self._last[tenant] = turn
        return turn

    def served(self, tokens: int, num_tenants: int) -> None:
        """A step has computed `tokens` tokens of prompts while so many tenants had prompts here."""
        self._virtual += tokens / num_tenants
        self._last = {tenant: turn for tenant, turn in self._last.items() if turn > self._virtual}

    def idle(self) -> None:
        """No prompt is left: whoever comes next, all are equal."""
        self._virtual = max(self._last.values(), default=self._virtual)
        self._last.clear()
