"""What a client asked for, after the front has validated it.

A `Request` is one stream of tokens. A client's `n=4` becomes four requests that share a prompt
and differ in seed, so nothing below the front knows about `n`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a stream ended, in OpenAI's words."""

    STOP = "stop"  # end-of-sequence token, stop token id, or stop string
    LENGTH = "length"  # max_tokens reached
    ABORT = "abort"  # the client went away or the front cut the stream


class Preference(StrEnum):
    """The client's wish about splitting (`x-diptych-prefer`); AUTO leaves it to the routing policy."""

    AUTO = "auto"
    SPLIT = "split"
    LOCAL = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop. The front guarantees the ranges.

    Order of application, as in `transformers` and vLLM: logit_bias, min_tokens mask, repetition /
    frequency / presence penalties, temperature, then top_k, top_p, min_p on the tempered distribution.
    Stop *strings* are the front's business (they need text); everything here is in tokens.
    """

    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0 means all
    top_p: float = 1.0  # (0, 1]
    min_p: float = 0.0  # [0, 1], relative to the most likely token
    frequency_penalty: float = 0.0  # [-2, 2], times the count in the output so far
    presence_penalty: float = 0.0  # [-2, 2], once per token present in the output so far
    repetition_penalty: float = 1.0  # > 0, over prompt and output (Keskar et al. 2019)
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none; 0: of the chosen token; k: also of the k most likely
    seed: int = 0  # [0, 2**64): draw number i is a pure function of (seed, i)
    min_tokens: int = 0  # no stop token may be chosen before this many outputs
    max_tokens: int = 16
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One validated stream to serve.

    `cache_salt` opens a separate prefix-cache namespace (a tenant): blocks are only shared among
    requests of equal salt. `tenant` is whose it is, for fair shares and quotas; shares of what several
    tenants want at once go by their `weight`. Of a tenant's waiting requests one of lower `priority` goes first (vLLM's
    meaning of the number). `timeout` (seconds from arrival to the last
    token) is the client's own deadline, if it is less than the router's. `checkpoint_tokens` is after how many tokens
    another worker gets a copy of the stream's KV, again and again (`policy.checkpoints`); 0: never.
    `race` is how many workers begin to prefill it, of which the first wins (`policy.races`).
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    prefer: Preference = Preference.AUTO
    cache_salt: str = ""
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    timeout: float | None = None
    checkpoint_tokens: int = 0
    race: int = 1


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One chosen token. Log-probabilities are natural logs of the distribution before temperature
    and truncation (the model's own), present if the request asked for them."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """A token on its way to the client. `index` counts output tokens from 0, so that a duplicate
    or a gap is seen at once. `finish` is set on the last one."""

    request_id: str
    index: int
    token: SampledToken
    finish: FinishReason | None = None
