"""What policy can order. The shells carry these out and feed the outcome back as events.

Worker actions are carried out by `worker.loop`, router actions by `router.dispatch`; a simulator
carries out both by scheduling the outcome.
"""

from __future__ import annotations

from dataclasses import dataclass

from diptych.core.blocks import BlockId
from diptych.core.errors import DiptychError
from diptych.core.fleet import WorkerId
from diptych.core.kv_layout import TransferPlan
from diptych.core.request import Request, SampledToken, TokenOutput
from diptych.core.sequence import Batch
from diptych.core.ticket import TicketClaims

# worker actions


@dataclass(frozen=True, slots=True)
class PushPages:
    """Send the pages of `plan` to the ticket's worker. Alone: they are ready, send all layers now.
    Inside a `RunStep`: send each layer as soon as the step has computed it."""

    request_id: str
    claims: TicketClaims
    plan: TransferPlan


@dataclass(frozen=True, slots=True)
class RunStep:
    """Run one step of the engine. Answered by StepFinished or StepFailed."""

    batch: Batch
    pushes: tuple[PushPages, ...] = ()


@dataclass(frozen=True, slots=True)
class DropRow:
    """Nobody wants this request of the running step any more. Answered by RowsDropped if the engine goes on without it;
    else its row is part of the step to the end."""

    request_id: str


@dataclass(frozen=True, slots=True)
class CloseHandoff:
    """All pages of this request are pushed; send the closing message with the first token after them."""

    request_id: str
    claims: TicketClaims
    token: SampledToken


@dataclass(frozen=True, slots=True)
class AbandonPush:
    """Send nothing more for this request. Answered by PushStopped once nobody reads its blocks."""

    request_id: str
    claims: TicketClaims


@dataclass(frozen=True, slots=True)
class GrantTicket:
    """Blocks are reserved (on one data-parallel rank): expect pages for them, and tell the router."""

    request: Request
    blocks: tuple[BlockId, ...]
    first_block: int
    num_tokens: int
    num_cached_tokens: int
    data_rank: int = 0


@dataclass(frozen=True, slots=True)
class RevokeTicket:
    """Accept nothing more for this request. Answered by WriterGone once nobody can write to its blocks."""

    request_id: str


@dataclass(frozen=True, slots=True)
class SendFirstToken:
    """The first token this worker makes for a request, with what the client is told about its prefill."""

    output: TokenOutput
    num_cached_tokens: int
    queue_seconds: float
    prefill_seconds: float


@dataclass(frozen=True, slots=True)
class SendTokens:
    """Further tokens of a step, one per sequence that sampled."""

    outputs: tuple[TokenOutput, ...]


@dataclass(frozen=True, slots=True)
class SendFailure:
    """This worker cannot go on with the request. Its blocks are given back (or soon will be)."""

    request_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ForgetRequest:
    """The engine may drop what it remembers of this request."""

    request_id: str


WorkerAction = (
    RunStep
    | DropRow
    | PushPages
    | CloseHandoff
    | AbandonPush
    | GrantTicket
    | RevokeTicket
    | SendFirstToken
    | SendTokens
    | SendFailure
    | ForgetRequest
)

# router actions


@dataclass(frozen=True, slots=True)
class StartLocal:
    """Have one worker serve the request alone: prefill where it decodes."""

    worker_id: WorkerId
    request: Request
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReserveBlocks:
    """Ask the decode worker for room and a ticket."""

    worker_id: WorkerId
    request: Request
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StartPrefill:
    """Have `worker_id` prefill and hand over to `target`, which minted `ticket`."""

    worker_id: WorkerId
    request: Request
    ticket: bytes
    target: WorkerId
    transport: str
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AbortOn:
    """Stop a request on one worker and give its blocks back."""

    worker_id: WorkerId
    request_id: str


@dataclass(frozen=True, slots=True)
class Deliver:
    """Pass one token on to the client, in order, exactly once."""

    output: TokenOutput


@dataclass(frozen=True, slots=True)
class DeliverFailure:
    """End the client's stream with an error."""

    request_id: str
    error: DiptychError


RouterAction = StartLocal | ReserveBlocks | StartPrefill | AbortOn | Deliver | DeliverFailure
