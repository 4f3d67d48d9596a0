"""Tokenising without holding up the event loop: what is large goes to a thread, what is hopeless nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from diptych.core.errors import ContextLengthError
from diptych.front.chat_template import ChatMessages
from diptych.front.text_checks import check_text
from diptych.front.tokenizer import TextCodec

Tokens = TypeVar("Tokens")

INLINE_CHARS = 2048  # shorter texts take less time than a change of threads
THREADS = 2


class PromptEncoder:
    """Encodes prompts for one model. Close it to end its threads."""

    def __init__(self, codec: TextCodec, max_model_len: int) -> None:
        self.codec = codec
        self._max_model_len = max_model_len
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenizer")

    async def encode_texts(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text.

        Raises:
            ContextLengthError: a text has more characters than the context's tokens can stand for.
        """
        for text in texts:
            self._refuse_hopeless(len(text), "prompt")
        size = sum(map(len, texts))
        return await self._run(size, lambda: [self.codec.encode(text, add_special_tokens) for text in texts])

    async def encode_chat(
        self, messages: ChatMessages, add_generation_prompt: bool = True, variables: dict[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation. The template writes its own special tokens."""
        size = sum(len(message["content"]) + 1 for message in messages)
        self._refuse_hopeless(size, "messages")

        def encode() -> list[int]:
            text = self.codec.render_chat(messages, add_generation_prompt, **(variables or {}))
            check_text(text, "messages")  # values for the template's own variables are in it too
            self._refuse_hopeless(len(text), "messages")
            return self.codec.encode(text, add_special_tokens=False)

        return await self._run(size, encode)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, size: int, encode: Callable[[], Tokens]) -> Tokens:
        if size <= INLINE_CHARS:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

    def _refuse_hopeless(self, num_chars: int, param: str) -> None:
        if num_chars > self._max_model_len * self.codec.max_token_chars:
            raise ContextLengthError(
                f"the prompt has {num_chars} characters; the model's context is {self._max_model_len} tokens"
                f" of at most {self.codec.max_token_chars} characters",
                param=param,
            )
