"""What the router knows of one stream: its log, where it runs, and what has gone wrong so far."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from diptych.core.actions import ReserveBlocks, RouterAction, StartLocal, StartPrefill
from diptych.core.fleet import Route, WorkerId
from diptych.core.request import Request, TokenOutput
from diptych.core.timeline import Timeline
from diptych.policy.backlog import Prompt
from diptych.policy.deadlines import Wait

Pair = tuple[WorkerId, WorkerId]  # (prefill, decode)


@dataclass(frozen=True, slots=True)
class Probe:
    """A shadow that shows whether a worker, or a pair, can be trusted again."""

    target: WorkerId | Pair


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A shadow that takes a copy of a stream's KV to another worker."""

    stream: LiveRequest


@dataclass(frozen=True, slots=True, eq=False)
class Rival:
    """A shadow that becomes a stream's attempt if its first token is the first."""

    stream: LiveRequest


@dataclass(slots=True, eq=False)
class Backup:
    """What is known of the copies of a stream's KV.

    Attributes:
        buddy: who keeps them; None while nobody does.
        due: the length of the log (tokens) at which the next copy is made.
        copy: the attempt that takes one there now.
        attempt: of the stream, for which the others hold.
    """

    buddy: WorkerId | None = None
    due: int = 0
    copy: LiveRequest | None = None
    attempt: int = 0


PROGRESS_TOKENS = 8  # an attempt that has come so far has nothing wrong with its request


@dataclass(slots=True, eq=False)
class LiveRequest:
    """The log of record of one stream, and what the client is told about it.

    Attributes:
        route: of the last attempt; None before the first.
        wait, wait_since: what it waits for now, and since when.
        prefill_tokens: credited to the worker that prefills, until the first token.
        early: tokens ahead of a missing one.
        attempt_id: what workers call the last attempt.
        attempt, began: number of the last one, 0 before the first, and when it began.
        num_resumed: tokens of the log that this attempt began with.
        kv_at: leading tokens of the log whose KV a worker has computed or received. Like the prefix index it is a
            hint, but one that does not depend on a report that is perhaps still under way.
        retries: attempts since it last made progress, beyond the first.
        crashes: workers that died, or engines that failed, while they computed it, since it last made progress.
        not_before: the next attempt waits until then.
        queued: seconds without a worker between attempts since the last token, not counting the present wait.
        last_error: why the last attempt ended, in words.
        is_late: the deadline of this wait has passed, and been blamed on somebody.
        shadow: what it runs for, if it is no client's request. Nobody receives its tokens.
        rivals: attempts that race with this one for the first token.
        backup: of a stream whose KV is copied to another worker while it runs.
    """

    request: Request
    timeline: Timeline
    wait_since: float
    wait: Wait = Wait.QUEUE
    route: Route | None = None
    prefill_tokens: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    early: dict[int, TokenOutput] = field(default_factory=dict)
    attempt_id: str = ""
    attempt: int = 0
    began: float = 0.0
    num_resumed: int = 0
    kv_at: dict[WorkerId, int] = field(default_factory=dict)
    retries: int = 0
    crashes: int = 0
    not_before: float = 0.0
    queued: float = 0.0
    last_error: str = ""
    is_late: bool = False
    shadow: Probe | Checkpoint | Rival | None = None
    rivals: list[LiveRequest] = field(default_factory=list)
    backup: Backup = field(default_factory=Backup)

    @property
    def is_load(self) -> bool:
        """Whether it counts as work that a worker was given. Probes and checkpoints take nobody's place."""
        return self.shadow is None or isinstance(self.shadow, Rival)

    @property
    def log(self) -> tuple[int, ...]:
        return (*self.request.prompt_token_ids, *self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def prompt(self) -> Prompt:
        """All of the log, as there is to compute where nothing of it is cached."""
        return Prompt(self.num_tokens, self.request.tenant, self.request.weight)

    @property
    def prefill(self) -> Prompt:
        """What the prefilling worker still owes."""
        return replace(self.prompt, tokens=self.prefill_tokens)

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        """Everybody who may hold blocks for it."""
        if self.wait is Wait.QUEUE or self.route is None:
            return ()
        return (self.route.decode,) if self.route.prefill is None else (self.route.decode, self.route.prefill)

    @property
    def pair(self) -> Pair | None:
        """The two workers of a split attempt."""
        if self.route is None or self.route.prefill is None:
            return None
        return self.route.prefill, self.route.decode

    @property
    def prefiller(self) -> WorkerId | None:
        return None if self.route is None else self.route.prefill or self.route.decode

    @property
    def handed_over(self) -> bool:
        """The decode worker has gone on from the first token: the prefill worker's part is done."""
        return len(self.output_token_ids) > self.num_resumed + 1

    @property
    def decodes(self) -> bool:
        """All of its KV is on the decode worker, which makes its tokens."""
        return self.wait is Wait.STALL and (self.pair is None or self.handed_over)

    @property
    def awaited(self) -> WorkerId | None:
        """The worker that has to act next."""
        if self.wait is Wait.QUEUE or self.route is None:
            return None
        return self.prefiller if self.wait is Wait.FIRST_TOKEN else self.route.decode

    def needs(self, worker_id: WorkerId) -> bool:
        """Whether it cannot go on without this worker."""
        if self.route is None or worker_id not in self.workers:
            return False
        return worker_id == self.route.decode or not self.handed_over

    def computes_on(self, worker_id: WorkerId) -> bool:
        """Whether it takes part in steps of this worker (or waits there to)."""
        return worker_id == self.awaited and (self.wait is Wait.FIRST_TOKEN or self.decodes)

    def waits_for(self, wait: Wait, now: float) -> None:
        self.wait, self.wait_since, self.is_late = wait, now, False

    def append(self, token_id: int, now: float) -> None:
        """The log grows."""
        self.output_token_ids.append(token_id)
        self.timeline.token(now)
        self.waits_for(Wait.STALL, now)
        self.queued = 0.0
        if len(self.output_token_ids) - self.num_resumed >= PROGRESS_TOKENS:
            self.retries = self.crashes = 0

    def begin(self, route: Route, prefill_tokens: int, now: float) -> RouterAction:
        """Start the next attempt there; returns what sets it going."""
        if self.attempt > 0 and self.wait is Wait.QUEUE:
            self.queued += now - self.wait_since
        if self.route is None:
            self.timeline.dispatched, self.timeline.split = now, route.prefill is not None
        self.attempt += 1
        own_id = self.request.request_id
        self.attempt_id = own_id if self.attempt == 1 else f"{own_id}~{self.attempt}"
        self.began = now
        self.route, self.prefill_tokens = route, prefill_tokens
        self.num_resumed = len(self.output_token_ids)
        request, outputs = replace(self.request, request_id=self.attempt_id), tuple(self.output_token_ids)
        if route.prefill is None:
            self.waits_for(Wait.FIRST_TOKEN, now)
            return StartLocal(route.decode, request, outputs)
        self.waits_for(Wait.RESERVE, now)
        return ReserveBlocks(route.decode, request, outputs)

    def prefill_with(self, ticket: bytes, now: float) -> StartPrefill | None:
        """The decode worker has granted a ticket; None if nobody waits for one."""
        if self.route is None or self.route.prefill is None or self.wait is not Wait.RESERVE:
            return None
        self.waits_for(Wait.FIRST_TOKEN, now)
        request, outputs = replace(self.request, request_id=self.attempt_id), tuple(self.output_token_ids)
        return StartPrefill(self.route.prefill, request, ticket, self.route.decode, self.route.transport, outputs)

    def take_over(self, rival: LiveRequest) -> None:
        """A rival's attempt, as far as it has come, is this stream's from now on."""
        self.attempt_id, self.began, self.route = rival.attempt_id, rival.began, rival.route
        self.prefill_tokens, self.early = rival.prefill_tokens, dict(rival.early)
        self.wait, self.wait_since, self.is_late = rival.wait, rival.wait_since, rival.is_late
        self.timeline.split = rival.pair is not None

    def stop(self, now: float) -> None:
        """The attempt is over; the stream waits for a worker."""
        self.prefill_tokens = 0
        self.early.clear()
        self.waits_for(Wait.QUEUE, now)
