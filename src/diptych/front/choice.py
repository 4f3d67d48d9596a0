"""One choice of an answer: a fold over its tokens that yields text, log-probabilities and the reason to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from diptych.core.request import FinishReason, Request, SampledToken, TokenOutput
from diptych.front.detokenizer import IncrementalDetokenizer
from diptych.front.stop_strings import StopStrings
from diptych.front.tokenizer import TextCodec


@dataclass(slots=True)
class Delta:
    """What a choice grew by. Tokens whose text is held back come with the delta that shows it.

    `text_offsets[i]` is where the text of `tokens[i]` begins in the choice's text.
    """

    index: int
    text: str = ""
    tokens: list[SampledToken] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    finish: FinishReason | None = None

    @classmethod
    def joined(cls, deltas: Sequence[Delta]) -> Delta:
        """All deltas of one choice as one."""
        tokens = [token for delta in deltas for token in delta.tokens]
        offsets = [offset for delta in deltas for offset in delta.text_offsets]
        text = "".join(delta.text for delta in deltas)
        return cls(deltas[0].index, text, tokens, offsets, deltas[-1].finish)


class Choice:
    """Turns the tokens of one core Request into Deltas.

    A token that ended the stream by its id shows no text. Text of the first `min_tokens` tokens is not
    searched for stop strings.
    """

    def __init__(self, index: int, request: Request, codec: TextCodec, stops: StopStrings, num_echo_chars: int) -> None:
        self.index = index
        self.num_tokens = 0
        self._min_tokens = request.sampling.min_tokens
        self._detokenizer = IncrementalDetokenizer(codec, request.prompt_token_ids)
        self._stops = stops
        self._num_chars = num_echo_chars
        self._pending = Delta(index)

    def add(self, output: TokenOutput) -> Delta:
        """The growth due to one token; empty while its text is held back."""
        self.num_tokens += 1
        pending = self._pending
        pending.tokens.append(output.token)
        pending.text_offsets.append(self._num_chars)
        raw = "" if output.finish is FinishReason.STOP else self._detokenizer.add(output.token.token_id)
        if output.finish is not None:
            raw += self._detokenizer.finish()
        self._num_chars += len(raw)
        text, stopped = self._stops.add(raw) if self.num_tokens > self._min_tokens else (raw, False)
        if stopped:
            pending.finish = FinishReason.STOP
        elif output.finish is not None:
            text += self._stops.finish()
            pending.finish = output.finish
        if not text and pending.finish is None:
            return Delta(self.index)
        pending.text = text
        self._pending = Delta(self.index)
        return pending
