"""What the operator can set about the front."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSettings:
    """Limits and names of one front.

    Attributes:
        served_model_names: what clients may write in `model`; the first one is written in answers.
        api_keys: if any, `/v1/*`, `/tokenize` and `/detokenize` need one of them. Each of several keys has
            its own prefix-cache namespace.
        max_body_bytes: larger bodies are refused (413) before they are read.
        body_timeout: seconds in which a body must have arrived (408).
        write_timeout: seconds in which a client must take what a stream wants to send; then it is cancelled.
        max_n, max_choices: most choices per prompt, and per request (over all of its prompts).
        max_stops, max_stop_chars: most stop strings, and the longest.
        max_logprobs: most alternatives per token.
        max_logit_bias: most entries of `logit_bias`.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    max_n: int = 16
    max_choices: int = 128
    max_stops: int = 16
    max_stop_chars: int = 256
    max_logprobs: int = 20
    max_logit_bias: int = 1024
