"""Tokens to text, one at a time, such that the pieces together equal the text of the whole."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.front.tokenizer import TextCodec

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # decoders look back: at most a character's bytes, or the space that a first word lacks
MAX_WINDOW = 32
MAX_UNFINISHED = 3  # bytes of a UTF-8 character that wants another one; some decoders show each as U+FFFD


class IncrementalDetokenizer:
    """Decodes a short window of recent tokens and gives out what is new and final.

    A character whose bytes are spread over tokens appears when its last byte does; bytes that can never
    become a character appear as U+FFFD as soon as that is certain.
    """

    def __init__(self, codec: TextCodec, prompt_token_ids: Sequence[int]) -> None:
        self._codec = codec
        self._window = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._emitted = len(codec.decode(self._window))  # characters of the window's text

    def add(self, token_id: int) -> str:
        """Text that became final with this token; often a token's own, sometimes none."""
        self._window.append(token_id)
        text = self._codec.decode(self._window)
        unfinished = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_UNFINISHED)
        new = text[self._emitted : len(text) - unfinished]
        self._emitted += len(new)
        if len(self._window) > MAX_WINDOW:
            self._window = self._window[-CONTEXT_TOKENS:]
            self._emitted = len(self._codec.decode(self._window)) - unfinished
        return new

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        rest = self._codec.decode(self._window)[self._emitted :]
        self._emitted += len(rest)
        return rest
