"""Requests that wait for room in the fleet, and whose turn it is.

Among tenants: start-time fair queueing (Goyal, Vin, Cheng 1996). Every tenant has a virtual time that grows by
cost / weight with each of its requests that leaves; the backlogged tenant with the least goes next (of equals the one
whose request came first). So while two tenants both wait, what they got differs from their weights by at most one
request each, however many requests one of them sends. The cost of a request is what it may take: prompt and
`max_tokens`.

Within a tenant: order of arrival, but each step of priority is worth `aging_seconds` of waiting. A request can
only be overtaken by those that come less than (difference in priority) x `aging_seconds` after it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from diptych.core.request import Request

MAX_IDLE_TENANTS = 1024  # whose virtual time is kept though nothing of theirs waits


@dataclass(frozen=True, slots=True)
class Waiting:
    """One request in the queue. `since` is when it came (seconds)."""

    request_id: str
    tenant: str
    prompt_tokens: int
    cost: int
    since: float


@dataclass(slots=True)
class _Tenant:
    virtual: float
    heap: list[tuple[float, int, str]] = field(default_factory=list)  # (rank, arrival number, request id)
    size: int = 0  # without removed requests, which stay in the heap until they come up
    prompt_tokens: int = 0


class FairQueue:
    """The queue. Holds nothing for a tenant that neither waits nor is ahead of the others.

    Args:
        weight: of a tenant; shares are proportional to it.
        aging_seconds: what one step of priority is worth.
    """

    def __init__(self, weight: Callable[[str], float], aging_seconds: float) -> None:
        self._weight = weight
        self._aging_seconds = aging_seconds
        self._waiting: dict[str, Waiting] = {}  # in order of arrival
        self._tenants: dict[str, _Tenant] = {}
        self._virtual = 0.0  # of the request that left last
        self._arrivals = 0
        self.prompt_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    @property
    def num_tenants(self) -> int:
        """Tenants of which anything is remembered."""
        return len(self._tenants)

    def tokens_of(self, tenant: str) -> int:
        """Prompt tokens of this tenant's waiting requests."""
        known = self._tenants.get(tenant)
        return 0 if known is None else known.prompt_tokens

    def backlogged(self) -> list[str]:
        """Tenants of which something waits."""
        return [name for name, tenant in self._tenants.items() if tenant.size]

    def push(self, request: Request, now: float) -> None:
        """Add a request. Raises ValueError if it waits already."""
        if request.request_id in self._waiting:
            raise ValueError(f"request {request.request_id} waits already")
        tokens = len(request.prompt_token_ids)
        cost = tokens + request.sampling.max_tokens
        self._waiting[request.request_id] = Waiting(request.request_id, request.tenant, tokens, cost, now)
        tenant = self._tenants.setdefault(request.tenant, _Tenant(self._virtual))
        rank = now + request.priority * self._aging_seconds
        heapq.heappush(tenant.heap, (rank, self._arrivals, request.request_id))
        self._arrivals += 1
        tenant.size += 1
        tenant.prompt_tokens += tokens
        self.prompt_tokens += tokens

    def first(self, eligible: Callable[[str], bool] = lambda tenant: True) -> Waiting | None:
        """Whose turn it is among tenants that are `eligible`; None if none of theirs waits."""
        heads = [self._head(self._tenants[name]) for name in filter(eligible, self.backlogged())]
        _, _, request_id = min(heads, default=(0.0, 0, None))
        return None if request_id is None else self._waiting[request_id]

    def _head(self, tenant: _Tenant) -> tuple[float, int, str]:
        """Of a tenant that waits: its virtual time, and the number and name of its next request."""
        while tenant.heap[0][2] not in self._waiting:
            heapq.heappop(tenant.heap)
        _, arrival, request_id = tenant.heap[0]
        return tenant.virtual, arrival, request_id

    def take(self, request_id: str) -> Waiting:
        """The request leaves to be served, at its tenant's expense. Raises KeyError if it does not wait.

        A tenant that was idle, or passed over because it was not eligible, does not get the lost time back."""
        waiting = self._waiting[request_id]
        tenant = self._tenants[waiting.tenant]
        self._virtual = max(self._virtual, tenant.virtual)
        tenant.virtual = self._virtual + waiting.cost / self._weight(waiting.tenant)
        self._drop(waiting)
        return waiting

    def remove(self, request_id: str) -> None:
        """The request leaves unserved. Harmless if it does not wait."""
        waiting = self._waiting.get(request_id)
        if waiting is not None:
            self._drop(waiting)

    def older_than(self, when: float) -> list[Waiting]:
        """Requests that have waited since before `when`, the oldest first."""
        old = []
        for waiting in self._waiting.values():
            if waiting.since >= when:
                break
            old.append(waiting)
        return old

    def _drop(self, waiting: Waiting) -> None:
        del self._waiting[waiting.request_id]
        tenant = self._tenants[waiting.tenant]
        tenant.size -= 1
        tenant.prompt_tokens -= waiting.prompt_tokens
        self.prompt_tokens -= waiting.prompt_tokens
        if len(tenant.heap) > 2 * tenant.size + 16:
            tenant.heap = [entry for entry in tenant.heap if entry[2] in self._waiting]
            heapq.heapify(tenant.heap)
        if tenant.size == 0:
            tenant.heap.clear()
            self._forget_idle()

    def _forget_idle(self) -> None:
        """Drop idle tenants that are not ahead of the others, and whoever exceeds the bound."""
        idle = [name for name, tenant in self._tenants.items() if tenant.size == 0]
        for name in idle:
            if self._tenants[name].virtual <= self._virtual or len(idle) > MAX_IDLE_TENANTS:
                del self._tenants[name]
