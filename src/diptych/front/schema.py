"""The fields that clients may send, with their types and ranges, as data.

Everything else is in one of two lists: features that change the answer and are not offered (refused), and
unknown names (ignored, and named in the answer).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from diptych.core.errors import RequestError
from diptych.front.json_body import printable

MAX_FIELDS = 128
MAX_N = 16
MAX_LOGPROBS = 20
MAX_PRIORITY = 8

Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=1)]
TokenId = Annotated[int, Meta(ge=0)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
LogitBias = Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
StopStrings = StopString | Annotated[list[StopString], Meta(max_length=16)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(msgspec.Struct, kw_only=True):
    """What chat and completions have in common. None means absent, as it does to OpenAI."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    max_tokens: Count | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=128)] | None = None


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None


class ChatBody(GenerationBody, kw_only=True):
    messages: list[Message]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None


class CompletionBody(GenerationBody, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: NumLogprobs | None = None
    echo: bool | None = None
    best_of: Count | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]


# Features that are not offered, each with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "functions": (None, []),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}

Body = TypeVar("Body", bound=msgspec.Struct)


def parse_body(body: dict[str, Any], schema: type[Body]) -> tuple[Body, tuple[str, ...]]:
    """Check names, types and ranges. Returns the body and the (printable) names of ignored fields.

    Raises:
        RequestError: 400 with `param`.
    """
    if len(body) > MAX_FIELDS:
        raise RequestError(f"more than {MAX_FIELDS} fields", code="too_many_fields")
    for name in body.keys() & UNSUPPORTED.keys():
        if body[name] not in UNSUPPORTED[name]:
            raise unsupported(name)
    known = {field.encode_name for field in msgspec.structs.fields(schema)}
    ignored = tuple(sorted(printable(name) for name in body.keys() - known - UNSUPPORTED.keys()))
    try:
        return msgspec.convert(body, schema), ignored
    except msgspec.ValidationError as error:
        raise _as_request_error(str(error)) from None


def unsupported(param: str, what: str | None = None) -> RequestError:
    return RequestError(f"{what or param} is not supported by this server", param=param, code="unsupported_parameter")


def _as_request_error(message: str) -> RequestError:
    """msgspec says "Expected `int` >= 1 - at `$.max_tokens`" or "... missing required field `model`"."""
    reason, _, path = message.partition(" - at `$")
    missing = re.search(r"missing required field `(\w+)`", reason)
    param = ".".join(filter(None, [path.rstrip("`").lstrip("."), missing[1] if missing else ""]))
    if missing:
        return RequestError(f"{param} is required", param=param, code="missing_required_parameter")
    return RequestError(f"{param}: {reason[0].lower()}{reason[1:]}", param=param or None, code="invalid_value")
