"""What can happen. Policy objects take these in `handle(event, now)` and answer with actions."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.core.blocks import BlockHash
from diptych.core.fleet import WorkerId, WorkerView
from diptych.core.request import Request, SampledToken, TokenOutput
from diptych.core.ticket import TicketClaims

# transfer events, source side (from the push sender)


@dataclass(frozen=True, slots=True)
class PushAccepted:
    """The target has verified and committed every page of this request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class PushRejected:
    """The target found something wrong and will not decode from these pages."""

    request_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class PushCancelled:
    """The target no longer wants this request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The data connection to a target broke with these requests under way."""

    worker_id: WorkerId
    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PushStopped:
    """After an abandon: the sender will not read this request's blocks again."""

    request_id: str


# transfer events, target side (from the KV receiver)


@dataclass(frozen=True, slots=True)
class HandoffComplete:
    """Every page is in place and verified; `token` is the first token, sampled by the source."""

    request_id: str
    token: SampledToken
    payload: bytes = b""  # what else the source said in closing


@dataclass(frozen=True, slots=True)
class HandoffFailed:
    """A page, ticket or closing message is wrong, or the writer is lost."""

    request_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class WriterGone:
    """After a revoke: nobody can write to this request's blocks any more."""

    request_id: str


# worker events (from the router, the engine and the clock)


@dataclass(frozen=True, slots=True)
class ServeRequested:
    """Continue this log here: prefill where it decodes."""

    request: Request
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReserveRequested:
    """Keep room for this log's KV; another worker will prefill it."""

    request: Request
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillRequested:
    """Prefill this log and push its pages to the worker that minted the ticket."""

    request: Request
    claims: TicketClaims
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AbortRequested:
    """Nobody wants this request any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The step of the last RunStep is done: one entry per row, None where the row did not sample or was dropped."""

    samples: tuple[SampledToken | None, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class RowsDropped:
    """The running step goes on without these requests: it neither reads nor writes their blocks any more."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The step of the last RunStep raised. `request_ids` are to blame; empty means the whole batch."""

    code: str
    message: str
    request_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: check the deadlines."""


WorkerEvent = (
    ServeRequested
    | ReserveRequested
    | PrefillRequested
    | AbortRequested
    | StepFinished
    | RowsDropped
    | StepFailed
    | Tick
    | PushAccepted
    | PushRejected
    | PushCancelled
    | LinkLost
    | PushStopped
    | HandoffComplete
    | HandoffFailed
    | WriterGone
)

# router events (from the front, the workers and the fleet)


@dataclass(frozen=True, slots=True)
class RequestSubmitted:
    request: Request


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """The client is gone, or has had enough."""

    request_id: str


@dataclass(frozen=True, slots=True)
class TicketGranted:
    """The decode worker has reserved blocks."""

    worker_id: WorkerId
    request_id: str
    ticket: bytes
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class FirstTokenMade:
    """A worker made its first token of a request."""

    worker_id: WorkerId
    output: TokenOutput
    num_cached_tokens: int
    queue_seconds: float
    prefill_seconds: float


@dataclass(frozen=True, slots=True)
class TokensMade:
    worker_id: WorkerId
    outputs: tuple[TokenOutput, ...]


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A worker cannot go on with a request."""

    worker_id: WorkerId
    request_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class WorkerUpdated:
    """A worker registered, changed state, or reported its load. Replaces what was known of it."""

    view: WorkerView


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """A worker's connection is lost, it fell silent, or it left."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True)
class BlocksCached:
    """A worker's prefix cache gained and lost blocks."""

    worker_id: WorkerId
    stored: tuple[BlockHash, ...]
    evicted: tuple[BlockHash, ...]


RouterEvent = (
    RequestSubmitted
    | Tick
    | RequestCancelled
    | TicketGranted
    | FirstTokenMade
    | TokensMade
    | RequestFailed
    | WorkerUpdated
    | WorkerGone
    | BlocksCached
)
