"""Tokens to text, one at a time, such that the pieces together equal the text of the whole."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.front.tokenizer import TextCodec

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # of the prompt: enough for decoders that treat the first word of a text differently
MAX_WINDOW = 16
MAX_DIRTY_WINDOW = 64
MAX_UNFINISHED = 3  # bytes of a UTF-8 character that wants another one; some decoders show each as U+FFFD


class IncrementalDetokenizer:
    """Decodes a short window of recent tokens and gives out what is new and final.

    A character whose bytes are spread over tokens appears when its last byte does; bytes that can never
    become a character appear as U+FFFD as soon as that is certain.

    The window begins where a character does, because decoders of the byte-fallback kind turn a whole run of
    byte tokens into U+FFFD when one of its characters is incomplete.
    """

    def __init__(self, codec: TextCodec, prompt_token_ids: Sequence[int]) -> None:
        self._codec = codec
        for size in range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_UNFINISHED + 1):
            self._window = list(prompt_token_ids[-size:])
            text = codec.decode(self._window)
            if REPLACEMENT not in text:
                break
        self._emitted = len(text)  # characters of the window's text that were given out
        self._clean = len(self._window)  # tokens of the window whose text was complete and was given out

    def add(self, token_id: int) -> str:
        """Text that became final with this token; often a token's own, sometimes none."""
        self._window.append(token_id)
        text = self._codec.decode(self._window)
        unfinished = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_UNFINISHED)
        new = text[self._emitted : len(text) - unfinished]
        if unfinished and REPLACEMENT in new and len(self._window) - self._clean <= MAX_UNFINISHED:
            return ""  # the character may still come, and these may be characters that were given out before
        self._emitted += len(new)
        self._shorten_window(is_clean=bool(new) and not unfinished, unfinished=unfinished)
        return new

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        rest = self._codec.decode(self._window)[self._emitted :]
        self._emitted += len(rest)
        return rest

    def _shorten_window(self, is_clean: bool, unfinished: int) -> None:
        if is_clean and len(self._window) > MAX_WINDOW:
            self._window = self._window[self._clean :]
            self._emitted = len(self._codec.decode(self._window))
        elif len(self._window) > MAX_DIRTY_WINDOW:  # no text for so long: these bytes mean nothing
            self._window = self._window[-CONTEXT_TOKENS:]
            self._emitted = len(self._codec.decode(self._window)) - unfinished
        if is_clean:
            self._clean = len(self._window)
