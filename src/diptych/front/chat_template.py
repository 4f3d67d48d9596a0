"""Chat templates as Hugging Face checkpoints carry them: Jinja, rendered in a sandbox.

The variables, filters and extensions are those that `transformers` gives to templates (its
`utils/chat_template_utils.py` is the only definition of this format), without importing it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from diptych.core.errors import CheckpointError, RequestError

ChatMessages = Sequence[Mapping[str, str]]


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; when serving, it means nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template and the special tokens that it may name (`bos_token`, ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
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
            RequestError: the template refuses these messages (say, roles that do not alternate).
        """
        context = self._special_tokens | {"tools": None, "documents": None} | variables
        context |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(context)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
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
