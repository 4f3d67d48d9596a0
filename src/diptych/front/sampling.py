"""From a checked body to SamplingParams: defaults, and the rules that join several fields."""

from __future__ import annotations

import hashlib

from diptych.core.errors import ContextLengthError, RequestError
from diptych.core.fleet import ModelInfo
from diptych.core.request import SamplingParams
from diptych.front.schema import ChatBody, CompletionBody, GenerationBody, unsupported
from diptych.front.text_checks import check_text

COMPLETION_MAX_TOKENS = 16  # OpenAI's default; in a chat it is what the context still holds


def sampling_params(body: GenerationBody, model: ModelInfo) -> SamplingParams:
    """Everything but `seed` and `max_tokens`, which differ among the choices of a request.

    Raises:
        RequestError: 400 with `param`.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    if temperature == 0 and (body.n or 1) > 1:
        raise _refusal("n", "n > 1 with temperature 0 would give the same answer n times")
    max_tokens, min_tokens = requested_max_tokens(body), body.min_tokens or 0
    if max(max_tokens or 0, min_tokens) >= model.max_model_len:
        wanted = max(max_tokens or 0, min_tokens)
        message = f"{wanted} tokens of output do not fit the model's context of {model.max_model_len} tokens"
        raise ContextLengthError(message, param="min_tokens" if wanted == min_tokens else max_tokens_field(body))
    if max_tokens is not None and min_tokens > max_tokens:
        raise _refusal("min_tokens", f"min_tokens {min_tokens} is more than max_tokens {max_tokens}")
    stop_token_ids = tuple(dict.fromkeys(body.stop_token_ids or ()))
    check_token_ids(stop_token_ids, model.vocab_size, "stop_token_ids")
    return SamplingParams(
        temperature=temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=_logit_bias(body, model.vocab_size),
        logprobs=_logprobs(body),
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=stop_token_ids,
    )


def max_tokens_field(body: GenerationBody) -> str:
    """The field that counts: OpenAI renamed it, for chats only."""
    renamed = isinstance(body, ChatBody) and body.max_completion_tokens is not None
    return "max_completion_tokens" if renamed else "max_tokens"


def requested_max_tokens(body: GenerationBody) -> int | None:
    requested: int | None = getattr(body, max_tokens_field(body))
    return requested


def max_tokens_for(body: GenerationBody, num_prompt_tokens: int, max_model_len: int) -> int:
    """How many tokens this prompt may get.

    Raises:
        ContextLengthError: prompt and requested output exceed the context.
    """
    requested = requested_max_tokens(body)
    needed = requested or max(1, body.min_tokens or 0)
    room = max_model_len - num_prompt_tokens
    if room < needed:
        raise ContextLengthError(
            f"the model's context is {max_model_len} tokens; the request wants {num_prompt_tokens + needed}"
            f" ({num_prompt_tokens} in the prompt, at least {needed} in the output)",
            param="messages" if isinstance(body, ChatBody) else "prompt",
        )
    if requested is not None:
        return requested
    return room if isinstance(body, ChatBody) else min(max(needed, COMPLETION_MAX_TOKENS), room)


def stop_strings(body: GenerationBody) -> tuple[str, ...]:
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    for stop in stops:
        check_text(stop, "stop")
    return stops


def choice_seed(seed: int, choice: int) -> int:
    """Choice 0 has the request's own seed, so n=1 and the first of n are the same."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(b"%d/%d" % (seed, choice), digest_size=8, person=b"diptych-choice").digest()
    return int.from_bytes(digest, "little")


def check_token_ids(token_ids: tuple[int, ...], vocab_size: int, param: str) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise _refusal(param, f"token id {str(wrong)[:24]} is not in [0, {vocab_size})")


def _logprobs(body: GenerationBody) -> int | None:
    """How many alternatives per token; None for no log-probabilities at all."""
    if isinstance(body, CompletionBody):
        if body.logprobs is not None and body.echo:
            raise unsupported("logprobs", "logprobs together with echo")
        return body.logprobs
    assert isinstance(body, ChatBody)
    if body.top_logprobs and not body.logprobs:
        raise _refusal("top_logprobs", "top_logprobs needs logprobs: true")
    return (body.top_logprobs or 0) if body.logprobs else None


def _logit_bias(body: GenerationBody, vocab_size: int) -> tuple[tuple[int, float], ...]:
    bias = body.logit_bias or {}
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size):
            raise _refusal("logit_bias", f"{key[:24]!a} is not a token id in [0, {vocab_size})")
    return tuple({int(key): value for key, value in bias.items()}.items())


def _refusal(param: str, message: str) -> RequestError:
    return RequestError(message, param=param, code="invalid_value")
