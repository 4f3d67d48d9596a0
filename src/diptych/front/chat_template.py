"""Chat templates as Hugging Face checkpoints carry them: Jinja, rendered in a sandbox.

The variables, filters and extensions are those that `transformers` gives to templates (its
`utils/chat_template_utils.py` is the only definition of this format), without importing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from diptych.core.errors import CheckpointError, RequestError
from diptych.front.template_sandbox import BoundedEnvironment, render_bounded

MAX_SOURCE_CHARS = 1 << 20
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)

ChatMessages = Sequence[Mapping[str, str]]


class ChatTemplate:
    """One compiled template and the special tokens that it may name (`bos_token`, ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise CheckpointError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE_CHARS}")
        try:
            self._template = BoundedEnvironment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(cls, directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
        """The template of a checkpoint: `chat_template.jinja`, or in tokenizer_config.json; None without one."""
        source = _source(directory, config.get("chat_template"))
        return None if source is None else cls(source, _special_tokens(config))

    def render(self, messages: ChatMessages, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt's text, special tokens written out.

        Raises:
            RequestError: the template refuses these messages (say, roles that do not alternate), or its work on
                them exceeds the bounds.
        """
        context = self._special_tokens | {"tools": None, "documents": None} | variables
        context |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return render_bounded(self._template, context)
        except TEMPLATE_ERRORS as error:
            raise RequestError(f"the model's chat template refuses the messages: {error}", param="messages") from error


def _source(directory: Path, configured: Any) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if isinstance(configured, list):
        named = {entry["name"]: entry["template"] for entry in configured}
        configured = named.get("default")
    return configured if isinstance(configured, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens stand as strings, or as objects with `content`."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
