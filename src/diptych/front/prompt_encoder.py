"""Tokenising without holding up the event loop: what is large goes to a thread, what is hopeless nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diptych.core.errors import ContextLengthError
from diptych.front.chat_template import ChatMessages
from diptych.front.tokenizer import TextCodec

INLINE_CHARS = 2048  # shorter texts take less time than a change of threads
THREADS = 2


class PromptEncoder:
    """Encodes prompts for one model. Close it to end its threads."""

    def __init__(self, codec: TextCodec, max_model_len: int) -> None:
        self.codec = codec
        self._max_model_len = max_model_len
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenizer")

    async def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            ContextLengthError: the text has more characters than the context's tokens can stand for.
        """
        self._refuse_hopeless(len(text))
        return await self._run(len(text), lambda: self.codec.encode(text, add_special_tokens))

    async def encode_chat(
        self, messages: ChatMessages, add_generation_prompt: bool = True, variables: dict[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation. The template writes its own special tokens."""
        size = sum(len(message["content"]) + 1 for message in messages)
        self._refuse_hopeless(size)

        def encode() -> list[int]:
            text = self.codec.render_chat(messages, add_generation_prompt, **(variables or {}))
            self._refuse_hopeless(len(text))
            return self.codec.encode(text, add_special_tokens=False)

        return await self._run(size, encode)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, size: int, encode: Callable[[], list[int]]) -> list[int]:
        if size <= INLINE_CHARS:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

    def _refuse_hopeless(self, num_chars: int) -> None:
        if num_chars > self._max_model_len * self.codec.max_token_chars:
            raise ContextLengthError(
                f"the prompt has {num_chars} characters; the model's context is {self._max_model_len} tokens"
                f" of at most {self.codec.max_token_chars} characters",
                param="prompt",
            )
