"""Answers in OpenAI's shapes, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from diptych.core.request import FinishReason
from diptych.front.choice import Delta
from diptych.front.logprobs import chat_logprobs, completion_logprobs
from diptych.front.openai_request import GenerationRequest
from diptych.front.tokenizer import TextCodec

Json = dict[str, Any]


class ChatAnswer:
    """Shapes of `chat.completion` and `chat.completion.chunk`."""

    def __init__(self, request: GenerationRequest, codec: TextCodec) -> None:
        self._request = request
        self._codec = codec
        self._envelope = _Envelope(request, "chat.completion")
        self._opened: set[int] = set()

    def whole(self, choices: Sequence[Delta], usage: Json) -> Json:
        return self._envelope.whole([self._choice(choice) for choice in choices], usage) | self._prompt_token_ids()

    def chunks(self, delta: Delta, usage: Json | None) -> list[Json]:
        """The role first, then content, then the finish reason in a chunk of its own."""
        chunks = []
        if delta.index not in self._opened:
            first = {} if self._opened else self._prompt_token_ids()
            self._opened.add(delta.index)
            chunks.append(self._chunk(Delta(delta.index), {"role": "assistant", "content": ""}, None, usage) | first)
        if delta.text or (delta.tokens and self._shows_tokens):
            chunks.append(self._chunk(delta, {"content": delta.text}, None, usage))
        if delta.finish is not None:
            chunks.append(self._chunk(Delta(delta.index), {}, delta.finish, usage))
        return chunks

    def usage_chunk(self, usage: Json) -> Json:
        return self._envelope.chunk([], usage)

    def _choice(self, delta: Delta) -> Json:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": delta.index, "message": message, "finish_reason": delta.finish} | self._extras(delta)

    def _chunk(self, delta: Delta, content: Json, finish: FinishReason | None, usage: Json | None) -> Json:
        choice = {"index": delta.index, "delta": content, "finish_reason": finish} | self._extras(delta)
        return self._envelope.chunk([choice], usage)

    @property
    def _shows_tokens(self) -> bool:
        return self._request.return_token_ids or self._request.wants_logprobs

    def _extras(self, delta: Delta) -> Json:
        wanted = self._request.wants_logprobs and delta.tokens
        extras: Json = {"logprobs": chat_logprobs(delta, self._codec) if wanted else None}
        return extras | _token_ids(self._request, delta)

    def _prompt_token_ids(self) -> Json:
        return {"prompt_token_ids": self._request.prompts[0]} if self._request.return_token_ids else {}


class CompletionAnswer:
    """Shapes of `text_completion`; a chunk has the same shape as a whole answer."""

    def __init__(self, request: GenerationRequest, codec: TextCodec) -> None:
        self._request = request
        self._codec = codec
        self._envelope = _Envelope(request, "text_completion")
        self._opened: set[int] = set()

    def whole(self, choices: Sequence[Delta], usage: Json) -> Json:
        return self._envelope.whole([self._first_choice(choice) for choice in choices], usage)

    def chunks(self, delta: Delta, usage: Json | None) -> list[Json]:
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            return [self._envelope.chunk([self._first_choice(delta)], usage)]
        if not delta.tokens:
            return []
        return [self._envelope.chunk([self._choice(delta, delta.text)], usage)]

    def usage_chunk(self, usage: Json) -> Json:
        return self._envelope.chunk([], usage)

    def _first_choice(self, delta: Delta) -> Json:
        """A choice from its beginning: with the echo of the prompt, and the prompt's token ids."""
        choice = self._choice(delta, self._request.echo_of(delta.index) + delta.text)
        if self._request.return_token_ids:
            choice["prompt_token_ids"] = self._request.requests[delta.index].prompt_token_ids
        return choice

    def _choice(self, delta: Delta, text: str) -> Json:
        logprobs = completion_logprobs(delta, self._codec) if self._request.wants_logprobs else None
        choice: Json = {"index": delta.index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish}
        return choice | _token_ids(self._request, delta)


class _Envelope:
    """The fields around the choices."""

    def __init__(self, request: GenerationRequest, kind: str) -> None:
        self._head: Json = {"id": request.request_id, "created": int(time.time()), "model": request.model}
        self._kind = kind
        self._chunk_kind = "chat.completion.chunk" if request.chat else kind
        self._with_usage = request.include_usage
        self._ignored = request.ignored

    def whole(self, choices: Sequence[Json], usage: Json) -> Json:
        warnings = {"warnings": [f"{name} is ignored" for name in self._ignored]} if self._ignored else {}
        return self._head | {"object": self._kind, "choices": choices, "usage": usage} | warnings

    def chunk(self, choices: Sequence[Json], usage: Json | None) -> Json:
        counted = {"usage": usage} if self._with_usage else {}
        return self._head | {"object": self._chunk_kind, "choices": choices} | counted


def _token_ids(request: GenerationRequest, delta: Delta) -> Json:
    return {"token_ids": [token.token_id for token in delta.tokens]} if request.return_token_ids else {}
