"""What the operator can set about the front."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSettings:
    """Names, keys and limits of one front. What a field of a request may hold stands in `schema`.

    Attributes:
        served_model_names: what clients may write in `model`; the first one is written in answers.
        api_keys: if any, `/v1/*`, `/tokenize` and `/detokenize` need one of them. Each of several keys has
            its own prefix-cache namespace.
        max_body_bytes: larger bodies are refused (413) before they are read.
        max_body_values: bodies with more JSON values are refused (400) before they are parsed.
        body_timeout: seconds in which a body must have arrived (408).
        write_timeout: seconds in which a client must take what a stream wants to send; then it is cancelled.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    max_body_values: int = 1 << 17
    body_timeout: float = 30.0
    write_timeout: float = 60.0

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("a served model needs a name; give one with --served-model-name")
        if not all(self.api_keys):
            raise ConfigError("an API key is empty, which would let everybody in; change --api-key")
