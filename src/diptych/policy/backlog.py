"""Prompts that a worker was given and has not finished, and which of them are in a newcomer's way.

A worker shares its steps among tenants by weight (`policy.fair_turns`). So before a newcomer is done at most everything
that is there is computed, but of others no more than their weights entitle them to while its own tenant's prompts are.
"""

from __future__ import annotations

from dataclasses import dataclass

SHORT = 4  # how many times shorter a prompt is that may share the steps of a longer one before it


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to compute, whose they are, and the weight of that tenant."""

    tokens: int
    tenant: str = ""
    weight: float = 1.0

    def is_short_beside(self, tokens: int) -> bool:
        """Whether it shares the steps of a prompt of that many tokens that comes before it."""
        return self.tokens * SHORT <= tokens


@dataclass(slots=True)
class _Own:
    """What a tenant has there."""

    weight: float
    tokens: int = 0
    longest: int = 0


class Backlog:
    """The prompts of one worker.

    Attributes:
        tokens: of all of them.
        num_prompts: how many there are.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.num_prompts = 0
        self._tenants: dict[str, _Own] = {}

    def add(self, prompt: Prompt) -> None:
        own = self._tenants.setdefault(prompt.tenant, _Own(prompt.weight))
        own.tokens += prompt.tokens
        own.longest = max(own.longest, prompt.tokens)
        self.tokens += prompt.tokens
        self.num_prompts += 1

    def ahead_of(self, prompt: Prompt) -> float:
        """Tokens of others that are computed before this prompt, which comes now, is done."""
        own = self._own(prompt)
        return min(self.tokens, (own.tokens + prompt.tokens) * self._tenants_per_share(prompt) - prompt.tokens)

    def own_before(self, prompt: Prompt) -> int:
        """Tokens of its own tenant that are computed before this prompt is begun. The longest prompt does not count
        for those much shorter, which share its steps."""
        own = self._own(prompt)
        return own.tokens - (own.longest if prompt.is_short_beside(own.longest) else 0)

    def _own(self, prompt: Prompt) -> _Own:
        return self._tenants.get(prompt.tenant) or _Own(prompt.weight)

    def _tenants_per_share(self, prompt: Prompt) -> float:
        """All weights there, by that of the prompt's tenant."""
        others = sum(own.weight for tenant, own in self._tenants.items() if tenant != prompt.tenant)
        return 1 + others / prompt.weight
