"""Every error that diptych raises on purpose. Each says whose fault it is and what to do.

DiptychError
├── RequestError            the client's request is wrong              400 (404, 413, ...)
│   └── ContextLengthError  prompt + max_tokens do not fit             400
├── AuthenticationFailed    the client's API key is missing or wrong   401
├── OverloadedError         this limit is reached; try again           429, Retry-After
├── UnavailableError        nobody can serve this now; try again       503, Retry-After
├── ServingError            we failed: worker lost, engine corrupt     500
│   └── EngineLost          a worker's engine has broken down for good (the worker ends)
├── ConfigError             the operator's flags, files or model       (start-up)
│   └── CheckpointError     a model directory that cannot be served    (start-up)
└── PeerError               another process broke the protocol         (connection closed)
    ├── ProtocolError       a frame that does not parse or is too big
    ├── HandshakeError      wrong key, version, model or layout
    └── TransferError       KV bytes that did not arrive, or not intact
        └── TicketError     forged, replayed, expired or foreign ticket
"""

from __future__ import annotations


class DiptychError(Exception):
    """Root of the tree. `code` is a stable machine-readable name, `status` its HTTP status."""

    code = "internal_error"
    status = 500

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class RequestError(DiptychError):
    """The client sent something that cannot be served. `param` names the offending field."""

    code = "invalid_request"
    status = 400

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.param = param
        if status is not None:
            self.status = status


class ContextLengthError(RequestError):
    """Prompt and requested output together exceed the model's context."""

    code = "context_length_exceeded"


class AuthenticationFailed(DiptychError):
    """No API key, or a wrong one."""

    code = "invalid_api_key"
    status = 401


class OverloadedError(DiptychError):
    """A limit is reached; `retry_after` (seconds) estimates when it is worth trying again."""

    code = "queue_full"
    status = 429

    def __init__(self, message: str, *, retry_after: float, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class UnavailableError(OverloadedError):
    """No worker that could serve this request is alive at the moment."""

    code = "no_worker"
    status = 503


class ServingError(DiptychError):
    """The request was fine; serving it failed on our side."""

    code = "serving_failed"
    status = 500


class EngineCorrupt(ServingError):
    """Logits of `request_ids` are not finite. The step may be run again without them; other rows are unharmed."""

    code = "engine_corrupt"

    def __init__(self, request_ids: tuple[str, ...]) -> None:
        super().__init__(f"the model's output is not finite for {', '.join(request_ids)}")
        self.request_ids = request_ids


class EngineLost(ServingError):
    """The engine will not compute again. Its worker ends, so that another one, of a new epoch, takes its place."""

    code = "engine_lost"


class ConfigError(DiptychError):
    """A flag, file or environment that the operator has to change."""

    code = "invalid_config"


class CheckpointError(ConfigError):
    """A model directory that is incomplete, malformed or of an unsupported kind."""

    code = "invalid_checkpoint"


class PeerError(DiptychError):
    """Another process of the fleet (or a stranger) broke the rules of the wire."""

    code = "peer_error"


class ProtocolError(PeerError):
    """A frame that is too large, does not parse, or comes out of turn."""

    code = "protocol_error"


class HandshakeError(PeerError):
    """The peer does not hold the fleet key, or speaks another version, model or layout."""

    code = "handshake_refused"


class TransferError(PeerError):
    """KV pages did not arrive, or did not arrive intact."""

    code = "transfer_failed"


class TicketError(TransferError):
    """A ticket that is forged, replayed, expired, or belongs to something else."""

    code = "ticket_refused"


def in_words(error: BaseException) -> str:
    """What went wrong with a file or a connection, for the end of a sentence."""
    match error:
        case ConnectionRefusedError():
            return "nobody listens there"
        case TimeoutError():
            return "no answer in time"
        case UnicodeDecodeError():
            return "it is no UTF-8 text"
        case OSError(strerror=str(reason)):
            return reason
    return str(error)
