"""Text to token ids and back.

`TextCodec` is what the front needs; `Tokenizer` implements it over a checkpoint's tokenizer.json and
`ByteTokenizer` without any file, for engines that have no text of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from diptych.core.errors import CheckpointError, RequestError
from diptych.front.chat_template import ChatMessages, ChatTemplate
from diptych.front.token_bytes import token_bytes_function


class TextCodec(Protocol):
    """Safe to use from several threads."""

    max_token_chars: int  # no token stands for more characters of a prompt

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special ones left out, U+FFFD for bytes that are no UTF-8."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, special ones included."""
        ...

    def render_chat(self, messages: ChatMessages, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt of a conversation, to be encoded without special tokens."""
        ...


class Tokenizer:
    """The tokenizer of a Hugging Face checkpoint."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None = None) -> None:
        self._backend = backend
        self._chat_template = chat_template
        self._added = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
        self._entry_bytes = token_bytes_function(json.loads(backend.to_str())["decoder"])
        self.max_token_chars = max(map(len, backend.get_vocab()), default=1)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja (the last two may be absent).

        Raises:
            CheckpointError: no tokenizer.json, or one of the files cannot be read.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{directory / 'tokenizer.json'} cannot be read: {error}") from error
        config_file = directory / "tokenizer_config.json"
        try:
            config = json.loads(config_file.read_bytes()) if config_file.is_file() else {}
        except ValueError as error:
            raise CheckpointError(f"{config_file} cannot be read: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, ChatTemplate.load(directory, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # encode_batch gives the interpreter back to other threads while it works.
        [encoding] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode("utf-8")
        entry = self._backend.id_to_token(token_id)
        return b"" if entry is None else self._entry_bytes(entry)

    def render_chat(self, messages: ChatMessages, add_generation_prompt: bool = True, **variables: Any) -> str:
        if self._chat_template is None:
            raise RequestError("this model has no chat template; use /v1/completions", param="messages")
        return self._chat_template.render(messages, add_generation_prompt, **variables)


class ByteTokenizer:
    """One token per UTF-8 byte. Ids from 256 on stand for their own number in angle brackets."""

    max_token_chars = 1

    def __init__(self) -> None:
        self._chat_template = ChatTemplate(
            "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<%d>" % token_id

    def render_chat(self, messages: ChatMessages, add_generation_prompt: bool = True, **variables: Any) -> str:
        return self._chat_template.render(messages, add_generation_prompt, **variables)
