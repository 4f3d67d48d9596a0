"""Whether a request may come in at all, before any work is spent on it, and when those that wait may start.

    429  a limit is reached: of this tenant, or of the router      503  nobody is there to serve it

Both say when it is worth coming back: when what is ahead will have drained, by measured rates, and a little later
for every other client, so that they do not all come back at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from diptych.core.errors import OverloadedError, UnavailableError
from diptych.core.request import Request
from diptych.policy.backlog import Prompt
from diptych.policy.fair_queue import FairQueue, Waiting
from diptych.policy.saturation import Room, RoomLimits

RESTART_SECONDS = 5.0  # what a worker of ours takes to come back, in round figures
JITTER = 0.25  # of an estimate, at most
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # multiples of it, without their whole part, fill [0, 1) evenly
DRAIN_MEMORY = 5.0  # seconds of busy time over which the drain of the queue is averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """What one tenant may have at once; None: no limit of its own.

    Attributes:
        weight: of its share while others wait, too.
        max_requests: served or waiting.
        max_queued_tokens: prompt tokens that wait.
        kv_share: of the fleet's KV cache, counting a request's prompt and `max_tokens`. Beyond it requests
            wait; a tenant that has nothing running may always start one.
    """

    weight: float = 1.0
    max_requests: int | None = None
    max_queued_tokens: int | None = None
    kv_share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """Bounds of the router.

    Attributes:
        max_requests: streams served or waiting.
        max_queued_tokens: prompt tokens that wait.
        max_queue_seconds: a request that would, by estimate, wait longer is refused.
        queue_timeout: one that did wait that long is given up (503).
        aging_seconds: what one step of priority is worth (see FairQueue).
        tenants: limits by tenant; others have those of `anybody`.
    """

    max_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    max_queue_seconds: float = 60.0
    queue_timeout: float = 120.0
    aging_seconds: float = 10.0
    anybody: TenantLimits = field(default_factory=TenantLimits)
    tenants: Mapping[str, TenantLimits] = field(default_factory=dict)
    room: RoomLimits = field(default_factory=RoomLimits)

    def of(self, tenant: str) -> TenantLimits:
        return self.tenants.get(tenant, self.anybody)


class DrainRate:
    """Prompt tokens per second at which a queue that does not run empty is served."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._last: float | None = None

    def served(self, waiting: Waiting, more: bool, now: float) -> None:
        """A request left the queue, in which `more` wait."""
        passed = now - (waiting.since if self._last is None else self._last)
        kept = math.exp(-passed / DRAIN_MEMORY)
        self._tokens = self._tokens * kept + waiting.prompt_tokens
        self._seconds = self._seconds * kept + DRAIN_MEMORY * (1 - kept)
        self._last = now if more else None

    @property
    def rate(self) -> float:
        """Infinite as long as it has not been busy for a second."""
        return self._tokens / self._seconds if self._seconds >= 1 else math.inf


@dataclass(slots=True)
class _Usage:
    """What a tenant has in the router."""

    requests: int = 0
    kv_tokens: int = 0  # promised to its running requests


class Admission:
    """Books of who has what, and the queue of those that wait. A request passes `refusal`, `enter`, `start` and
    `leave`, in this order; `leave` may come at any time."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.queue = FairQueue(lambda tenant: limits.of(tenant).weight, limits.aging_seconds)
        self.refused: Counter[str] = Counter()  # by code
        self._limits = limits
        self._num_requests = 0
        self._usage: dict[str, _Usage] = {}
        self._running: dict[str, int] = {}  # request -> the KV tokens that it was promised
        self._drain = DrainRate()

    def refusal(self, tenant: str, prompt_tokens: int, patience: float | None, room: Room) -> OverloadedError | None:
        """Why a request cannot come in now; None if it can. `patience` is for how many seconds its client
        would wait."""
        limits, own = self._limits, self._limits.of(tenant)
        if not room:
            return self._refuse(UnavailableError, "no worker is ready to serve requests", RESTART_SECONDS, "no_worker")
        requests = self._usage[tenant].requests if tenant in self._usage else 0
        queued = self.queue.tokens_of(tenant)
        wait = self.wait_seconds(Prompt(prompt_tokens, tenant, own.weight), room)
        if own.max_requests is not None and requests >= own.max_requests:
            reason = f"{requests} requests of this key are being served or wait, its limit is {own.max_requests}"
            return self._refuse(OverloadedError, reason, wait, "tenant_requests")
        if own.max_queued_tokens is not None and queued and queued + prompt_tokens > own.max_queued_tokens:
            reason = f"{queued} prompt tokens of this key wait already, its limit is {own.max_queued_tokens}"
            return self._refuse(OverloadedError, reason, wait, "tenant_tokens")
        if self._num_requests >= limits.max_requests:
            reason = f"{self._num_requests} requests are being served or wait, the limit is {limits.max_requests}"
            return self._refuse(OverloadedError, reason, wait, "queue_full")
        if self.queue and self.queue.prompt_tokens + prompt_tokens > limits.max_queued_tokens:
            reason = f"{self.queue.prompt_tokens} prompt tokens wait already, the limit is {limits.max_queued_tokens}"
            return self._refuse(OverloadedError, reason, wait, "queue_full")
        longest = min(limits.max_queue_seconds, math.inf if patience is None else patience)
        if wait > longest:
            reason = f"it would wait {wait:.1f} s for its turn, the limit is {longest:g} s"
            return self._refuse(OverloadedError, reason, wait - longest, "queue_full")
        return None

    def wait_seconds(self, prompt: Prompt, room: Room) -> float:
        """Estimate of how long a prompt would wait until it is begun:
        what a worker has been given, and what will leave the queue before it. Of others that is at most what their
        weights entitle them to while the tenant's own requests leave."""
        rate = min(room.prefill_rate, self._drain.rate)
        weights = {name: self._limits.of(name).weight for name in (*self.queue.backlogged(), prompt.tenant)}
        own = self.queue.tokens_of(prompt.tenant) * sum(weights.values()) / prompt.weight
        return room.busy_seconds(prompt) + min(self.queue.prompt_tokens, own) / rate

    def enter(self, request: Request, now: float) -> None:
        """The request is accepted, and waits."""
        self._num_requests += 1
        self._usage.setdefault(request.tenant, _Usage()).requests += 1
        self.queue.push(request, now)

    def next(self, room: Room, passed_over: Collection[str] = ()) -> str | None:
        """The request whose turn it is, if any, among all tenants but those."""
        waiting = self.queue.first(lambda tenant: tenant not in passed_over and self._within_share(tenant, room))
        return None if waiting is None else waiting.request_id

    def start(self, request_id: str, now: float) -> None:
        """The request leaves the queue to be served."""
        waiting = self.queue.take(request_id)
        self._drain.served(waiting, bool(self.queue), now)
        self._running[request_id] = waiting.cost
        self._usage[waiting.tenant].kv_tokens += waiting.cost

    def expired(self, now: float) -> list[tuple[str, OverloadedError]]:
        """Requests that have waited too long, and what their clients are told."""
        overdue = self.queue.older_than(now - self._limits.queue_timeout)
        reason = f"no room for this request within {self._limits.queue_timeout:g} s"
        return [
            (waiting.request_id, self._refuse(UnavailableError, reason, RESTART_SECONDS, "queue_timeout"))
            for waiting in overdue
        ]

    def leave(self, request: Request) -> None:
        """The request is over, wherever it was."""
        self._num_requests -= 1
        self.queue.remove(request.request_id)
        usage = self._usage[request.tenant]
        usage.requests -= 1
        usage.kv_tokens -= self._running.pop(request.request_id, 0)
        if usage.requests == 0:
            del self._usage[request.tenant]

    def _within_share(self, tenant: str, room: Room) -> bool:
        used = self._usage[tenant].kv_tokens
        return used == 0 or used < self._limits.of(tenant).kv_share * room.kv_tokens

    def _refuse(self, kind: type[OverloadedError], reason: str, seconds: float, code: str) -> OverloadedError:
        self.refused[code] += 1
        later = 1 + JITTER * (self.refused.total() * GOLDEN_RATIO % 1)
        return kind(reason, retry_after=max(1.0, seconds) * later, code=code)
