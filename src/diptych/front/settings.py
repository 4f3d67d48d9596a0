"""What the operator can set about the front."""

from __future__ import annotations

from dataclasses import dataclass, field

from diptych.core.errors import ConfigError
from diptych.front.tenants import TenantKeys

MIN_CHECKPOINT_TOKENS = 16  # a copy more often would bring less than a block
MAX_RACE = 4  # workers that prefill one prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSettings:
    """Names, keys and limits of one front. What a field of a request may hold stands in `schema`.

    Attributes:
        served_model_names: what clients may write in `model`; the first one is written in answers.
        keys: if any, `/v1/*`, `/tokenize` and `/detokenize` need one of them.
        max_body_bytes: larger bodies are refused (413) before they are read.
        max_body_values: bodies with more JSON values are refused (400) before they are parsed.
        body_timeout: seconds in which a body must have arrived (408).
        write_timeout: seconds in which a client must take what a stream wants to send; then it is cancelled.
        keep_alive_seconds: a stream that has nothing to say for so long sends a comment, lest something on the
            way takes it for dead.
        copies: whether workers can keep copies of streams' KV: in their prefix caches.
        checkpoint_tokens, race: what the fields of a `Request` are unless a header says otherwise.
    """

    served_model_names: tuple[str, ...]
    keys: TenantKeys = field(default_factory=TenantKeys)
    max_body_bytes: int = 4 << 20
    max_body_values: int = 1 << 17
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    keep_alive_seconds: float = 15.0
    copies: bool = True
    checkpoint_tokens: int = 0
    race: int = 1

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("a served model needs a name; give one with --served-model-name")
        if self.checkpoint_tokens and self.checkpoint_tokens < MIN_CHECKPOINT_TOKENS:
            raise ConfigError(f"--checkpoint-tokens is 0 or at least {MIN_CHECKPOINT_TOKENS}")
