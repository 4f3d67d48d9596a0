"""Log-probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

from typing import Any

from diptych.front.choice import Delta
from diptych.front.tokenizer import TextCodec

LOWEST = -9999.0  # JSON has no -infinity; OpenAI writes this


def chat_logprobs(delta: Delta, codec: TextCodec) -> dict[str, Any]:
    """`{"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}], "refusal": null}`"""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        piece = codec.token_bytes(token_id)
        return {"token": _text(piece), "logprob": _finite(logprob), "bytes": list(piece)}

    content = [
        entry(token.token_id, token.logprob) | {"top_logprobs": [entry(*top) for top in token.top_logprobs]}
        for token in delta.tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(delta: Delta, codec: TextCodec) -> dict[str, Any]:
    """`{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`; the sampled token is among its alternatives."""
    texts = [_text(codec.token_bytes(token.token_id)) for token in delta.tokens]
    alternatives = [
        {_text(codec.token_bytes(token_id)): _finite(logprob) for token_id, logprob in token.top_logprobs}
        | {text: _finite(token.logprob)}
        for text, token in zip(texts, delta.tokens, strict=True)
    ]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(token.logprob) for token in delta.tokens],
        "top_logprobs": alternatives,
        "text_offset": delta.text_offsets,
    }


def _text(piece: bytes) -> str:
    """A token that is only a part of a character shows its bytes as `\\xe4`."""
    return piece.decode("utf-8", "backslashreplace")


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)
