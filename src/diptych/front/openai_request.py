"""From OpenAI's request bodies to `GenerationRequest`: one validated core Request per choice."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diptych.core.errors import RequestError
from diptych.core.fleet import ModelInfo
from diptych.core.request import Preference, Request, SamplingParams
from diptych.front.json_body import printable
from diptych.front.prompt_encoder import PromptEncoder
from diptych.front.sampling import check_token_ids, choice_seed, max_tokens_for, sampling_params, stop_strings
from diptych.front.schema import (
    ChatBody,
    CompletionBody,
    ContentPart,
    GenerationBody,
    Message,
    StreamOptions,
    parse_body,
    unsupported,
)
from diptych.front.settings import FrontSettings
from diptych.front.tenants import NOBODY, Tenant
from diptych.front.text_checks import check_text

MAX_CHOICES = 128  # of one request, over all of its prompts

# Templates know these three roles; "developer" is OpenAI's newer name for the first.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One HTTP request for generated text.

    `requests[i]` is the choice of index i: the n choices of the first prompt, then those of the second...
    `echo[p]` is put before the text of prompt p's choices.
    """

    request_id: str
    model: str
    chat: bool
    requests: tuple[Request, ...]
    n: int = 1
    echo: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [request.prompt_token_ids for request in self.requests[:: self.n]]

    @property
    def wants_logprobs(self) -> bool:
        return self.requests[0].sampling.logprobs is not None

    def echo_of(self, choice: int) -> str:
        return self.echo[choice // self.n] if self.echo else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """What the headers say: whose request it is, the wish about splitting, the seconds it may take, and after how many
    tokens its KV is copied and how many workers prefill it (None: as the deployment does)."""

    tenant: Tenant = NOBODY
    prefer: Preference = Preference.AUTO
    timeout: float | None = None
    checkpoint_tokens: int | None = None
    race: int | None = None


@dataclass(frozen=True, slots=True)
class _Checked:
    """A body that passed everything that can be checked without its tokens."""

    body: GenerationBody
    sampling: SamplingParams
    stops: tuple[str, ...]
    ignored: tuple[str, ...]


class RequestBuilder:
    """Validates in order of cost: names and types, ranges, then tokens."""

    def __init__(self, encoder: PromptEncoder, model: ModelInfo, settings: FrontSettings) -> None:
        self._encoder = encoder
        self._model = model
        self._settings = settings

    async def chat(self, raw: dict[str, Any], caller: Caller) -> GenerationRequest:
        """Validate the body of /v1/chat/completions. Raises RequestError."""
        body, ignored = parse_body(raw, ChatBody)
        checked = self._check(body, ignored)
        messages = template_messages(body.messages)
        variables = body.chat_template_kwargs or {}
        reserved = {"messages", "add_generation_prompt"} & variables.keys()
        if reserved:
            raise RequestError(f"{min(reserved)} has a field of its own", param="chat_template_kwargs")
        token_ids = await self._encoder.encode_chat(messages, body.add_generation_prompt is not False, variables)
        if not token_ids:
            raise RequestError("the messages render to nothing", param="messages", code="invalid_value")
        return self._assemble(checked, caller, [tuple(token_ids)])

    async def completion(self, raw: dict[str, Any], caller: Caller) -> GenerationRequest:
        """Validate the body of /v1/completions. Raises RequestError."""
        body, ignored = parse_body(raw, CompletionBody)
        checked = self._check(body, ignored)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise unsupported("best_of", "best_of other than n")
        prompts = _split_prompts(body.prompt)
        if len(prompts) * (body.n or 1) > MAX_CHOICES:
            message = f"more than {MAX_CHOICES} choices in one request"
            raise RequestError(message, param="prompt", code="invalid_value")
        for prompt in prompts:
            self._check_prompt(prompt)
        token_ids = await self._encode(prompts)
        echo = [self._text_of(prompt) for prompt in prompts] if body.echo else []
        return self._assemble(checked, caller, token_ids, echo)

    def _check(self, body: GenerationBody, ignored: tuple[str, ...]) -> _Checked:
        check_model(body.model, self._settings)
        if body.stream_options is not None and not body.stream:
            message = "stream_options are for streams; set stream: true"
            raise RequestError(message, param="stream_options", code="invalid_value")
        sampling = sampling_params(body, self._model)
        return _Checked(body, sampling, stop_strings(body), ignored)

    def _check_prompt(self, prompt: str | tuple[int, ...]) -> None:
        if not prompt:
            raise RequestError("the prompt is empty", param="prompt", code="invalid_value")
        if isinstance(prompt, str):
            check_text(prompt, "prompt")
        else:
            check_token_ids(prompt, self._model.vocab_size, "prompt")

    async def _encode(self, prompts: Sequence[str | tuple[int, ...]]) -> list[tuple[int, ...]]:
        encoded = iter(await self._encoder.encode_texts([prompt for prompt in prompts if isinstance(prompt, str)]))
        token_ids = [tuple(next(encoded)) if isinstance(prompt, str) else prompt for prompt in prompts]
        if not all(token_ids):
            raise RequestError("the prompt has no tokens", param="prompt", code="invalid_value")
        return token_ids

    def _text_of(self, prompt: str | tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else self._encoder.codec.decode(prompt)

    def _assemble(
        self, checked: _Checked, caller: Caller, prompts: Sequence[tuple[int, ...]], echo: Sequence[str] = ()
    ) -> GenerationRequest:
        """One core request per choice, each with its prompt, its room in the context and its seed."""
        body, n = checked.body, checked.body.n or 1
        chat = isinstance(body, ChatBody)
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
        cache_salt = _cache_salt(caller.tenant, body.cache_salt)
        every, default = caller.checkpoint_tokens, self._settings
        checkpoint_tokens = default.checkpoint_tokens if every is None else every
        race = default.race if caller.race is None else caller.race
        requests: list[Request] = []
        for prompt in prompts:
            max_tokens = max_tokens_for(body, len(prompt), self._model.max_model_len)
            for choice in range(n):
                sampling = replace(checked.sampling, seed=choice_seed(seed, choice), max_tokens=max_tokens)
                requests.append(
                    Request(
                        request_id=f"{request_id}.{len(requests)}",
                        prompt_token_ids=prompt,
                        sampling=sampling,
                        prefer=caller.prefer,
                        cache_salt=cache_salt,
                        tenant=caller.tenant.name,
                        priority=body.priority or 0,
                        timeout=caller.timeout,
                        checkpoint_tokens=checkpoint_tokens,
                        race=race,
                    )
                )
        options = body.stream_options or StreamOptions()
        return GenerationRequest(
            request_id=request_id,
            model=body.model,
            chat=chat,
            requests=tuple(requests),
            n=n,
            echo=tuple(echo),
            stops=checked.stops,
            include_stop=bool(body.include_stop_str_in_output),
            stream=bool(body.stream),
            include_usage=bool(options.include_usage or options.continuous_usage_stats),
            continuous_usage=bool(options.continuous_usage_stats),
            return_token_ids=bool(body.return_token_ids),
            ignored=checked.ignored,
        )


def _cache_salt(tenant: Tenant, own: str | None) -> str:
    """A client may divide its tenant's namespace further, and cannot leave it: no tenant's name has a slash."""
    if own is None:
        return tenant.cache_salt
    check_text(own, "cache_salt")
    return f"{tenant.cache_salt}/{own}"


def check_model(name: str, settings: FrontSettings) -> None:
    if name not in settings.served_model_names:
        served = ", ".join(settings.served_model_names)
        message = f"model {printable(name)!r} is not served here; served: {served}"
        raise RequestError(message, param="model", code="model_not_found", status=404)


def template_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates read them: a role, and a content that is one string.

    Raises:
        RequestError: 400 with `param` like `messages[2].role`.
    """
    if not messages:
        raise RequestError("messages are empty", param="messages", code="invalid_value")
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _template_message(message: Message, param: str) -> dict[str, str]:
    if message.role == "tool":
        text = "a tool message must answer a tool call, and this server makes none"
        raise RequestError(text, param=f"{param}.role", code="unsupported_parameter")
    if message.role not in ROLES:
        text = f"role {printable(message.role)!r} is unknown; known: {', '.join(ROLES)}"
        raise RequestError(text, param=f"{param}.role", code="invalid_value")
    if message.content is None:
        raise RequestError(f"{param}.content is required", param=f"{param}.content", code="missing_required_parameter")
    content = message.content if isinstance(message.content, str) else _join_parts(message.content, f"{param}.content")
    check_text(content, f"{param}.content")
    rendered = {"role": ROLES[message.role], "content": content}
    if message.name is not None:
        check_text(message.name, f"{param}.name")
        rendered["name"] = message.name
    return rendered


def _join_parts(parts: Sequence[ContentPart], param: str) -> str:
    for i, part in enumerate(parts):
        if part.type != "text":
            raise unsupported(f"{param}[{i}].type", f"content of type {printable(part.type)!r}")
        if part.text is None:
            raise RequestError("text is required", param=f"{param}[{i}].text", code="missing_required_parameter")
    return "\n".join(part.text or "" for part in parts)


def _split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | tuple[int, ...]]:
    """The four forms of `prompt`: a text, token ids, texts, lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("the prompt is empty", param="prompt", code="invalid_value")
    kinds = set(map(type, prompt))
    if len(kinds) > 1:
        raise RequestError("prompt mixes texts and token ids", param="prompt", code="invalid_value")
    if kinds == {int}:
        return [tuple(prompt)]  # type: ignore[arg-type]
    return [item if isinstance(item, str) else tuple(item) for item in prompt]  # type: ignore[arg-type]
