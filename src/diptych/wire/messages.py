"""Every message between router and workers. One tagged union for each direction.

Messages carry core's frozen dataclasses. They hold no addresses, pointers or paths that a receiver would
follow, except `KVEndpoint`, which only the router passes on, and only to workers that hold the fleet key.
"""

from __future__ import annotations

import msgspec

from diptych.core.fleet import Epoch, KVEndpoint, Manifest, Role, WorkerId, WorkerStats
from diptych.core.request import Request, TokenOutput

WIRE_VERSION = 3


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages: the class name is the tag."""


# worker -> router


class Loading(Message, frozen=True):
    """The model is being loaded: `done` of `total` parts."""

    worker_id: WorkerId
    done: int
    total: int


class WantEpoch(Message, frozen=True):
    """From a worker that nobody here supervises, before anything else: a number for its life that is higher
    than those of its lives before (`above` is the last that it knows of). Answered by NewEpoch."""

    worker_id: WorkerId
    above: Epoch


class Hello(Message, frozen=True):
    """First message of a worker that is ready: who it is, and what it serves."""

    wire_version: int
    worker_id: WorkerId
    epoch: Epoch
    pid: int
    role: Role
    manifest: Manifest


class Leaving(Message, frozen=True):
    """Give me no new work. Answered by Shutdown once nothing here is needed any more."""


class Heartbeat(Message, frozen=True):
    """This is the load. Answers each Ping at once, and is sent soon after a change; `ping` is the number of the last
    Ping that came (0: none yet), which proves both directions of the connection. `turned_away`: see WorkerView."""

    stats: WorkerStats
    ping: int
    turned_away: tuple[tuple[str, int], ...]


class Granted(Message, frozen=True):
    """Blocks are reserved; the ticket is opaque to the router."""

    request_id: str
    ticket: bytes
    num_cached_tokens: int


class Prefilled(Message, frozen=True):
    """The first token that this worker made for a request, with durations in seconds."""

    output: TokenOutput
    num_cached_tokens: int
    queue_seconds: float
    prefill_seconds: float


class Tokens(Message, frozen=True):
    """One step's further tokens."""

    outputs: list[TokenOutput]


class Failed(Message, frozen=True):
    """This worker cannot go on with a request."""

    request_id: str
    code: str
    message: str


class KVEvents(Message, frozen=True):
    """Block hashes that entered and left the prefix cache."""

    stored: list[bytes]
    evicted: list[bytes]


FromWorker = WantEpoch | Loading | Hello | Leaving | Heartbeat | Granted | Prefilled | Tokens | Failed | KVEvents


# router -> worker


class NewEpoch(Message, frozen=True):
    epoch: Epoch


class Welcome(Message, frozen=True):
    wire_version: int


class Refused(Message, frozen=True):
    """The worker does not fit this fleet; it should end and say why."""

    reason: str


class Ping(Message, frozen=True):
    """Sent every second, unless the last one is not answered yet. Answered by a Heartbeat."""

    number: int


class Serve(Message, frozen=True):
    """Continue this log alone: prefill where it decodes."""

    request: Request
    output_token_ids: tuple[int, ...]


class Reserve(Message, frozen=True):
    """Keep room for this log; answered by Granted."""

    request: Request
    output_token_ids: tuple[int, ...]


class Prefill(Message, frozen=True):
    """Prefill this log and push its pages to `endpoint`, where the ticket's worker takes them in."""

    request: Request
    output_token_ids: tuple[int, ...]
    ticket: bytes
    endpoint: KVEndpoint


class Abort(Message, frozen=True):
    request_id: str


class WarmUp(Message, frozen=True):
    """Open the data connection to this worker now; requests will follow."""

    worker_id: WorkerId
    epoch: Epoch
    endpoint: KVEndpoint


class Shutdown(Message, frozen=True):
    """End now."""


ToWorker = NewEpoch | Welcome | Refused | Ping | Serve | Reserve | Prefill | Abort | WarmUp | Shutdown
