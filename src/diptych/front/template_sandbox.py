"""Jinja for templates that somebody else wrote: no way out, no end of work, no flood of text.

Jinja's sandbox keeps a template from Python's inside. What it does not bound is work, so every body of a loop or
macro begins here with a step, of which one rendering has so many; and what operators and the text itself may
grow to is limited, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MAX_STEPS = 1 << 18  # of loops and macros: some tenths of a second
MAX_TEXT = 32 << 20  # characters; a context has fewer
MAX_WIDTH = 1 << 16  # of padding, indentation and the like
MAX_POWER = 1 << 12  # bits of a power
STEP = "_diptych_step"  # no template's own name

_steps_left: ContextVar[list[int]] = ContextVar("steps_left")


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; when serving, it means nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The variables, filters and extensions of chat templates, and their bounds."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.filters["tojson"] = _tojson
        for name in ("center", "indent", "format", "wordwrap"):
            self.filters[name] = _with_small_numbers(self.filters[name])
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals[STEP] = _step

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            step = nodes.Call(nodes.Name(STEP, "load"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(step, lineno=loop.lineno))  # type: ignore[attr-defined]
        return template.set_environment(self)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise SecurityError("text is not formatted with %")
        if operator == "**" and not _small_power(left, right):
            raise SecurityError("a power is too large")
        if operator == "*" and _repeats_too_much(left, right):
            raise SecurityError("a repetition is too long")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if isinstance(getattr(function, "__self__", None), str):
            _check_small(args, kwargs)
        return super().call(context, function, *args, **kwargs)


def render_bounded(template: jinja2.Template, context: Mapping[str, Any]) -> str:
    """The text of a template of a `BoundedEnvironment`.

    Raises:
        SecurityError (a TemplateError): it does more work, or makes more text, than it may.
    """
    token = _steps_left.set([MAX_STEPS])
    try:
        pieces, size = [], 0
        for piece in template.generate(context):
            size += len(piece)
            if size > MAX_TEXT:
                raise SecurityError("it makes too much text")
            pieces.append(piece)
        return "".join(pieces)
    finally:
        _steps_left.reset(token)


def _step() -> None:
    left = _steps_left.get()
    left[0] -= 1
    if left[0] < 0:
        raise SecurityError("it does too much work")


def _small_power(left: Any, right: Any) -> bool:
    if not isinstance(left, int) or not isinstance(right, int):
        return True
    return left.bit_length() * max(right, 0) <= MAX_POWER


def _repeats_too_much(left: Any, right: Any) -> bool:
    """Whether the product of a sequence and a number is longer than it may be."""
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            return len(sequence) * max(count, 0) > (MAX_TEXT if isinstance(sequence, str) else MAX_STEPS)
    return False


def _with_small_numbers(function: Any) -> Any:
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_small(args, kwargs)
        return function(*args, **kwargs)

    return checked


def _check_small(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if any(isinstance(value, int) and value > MAX_WIDTH for value in (*args, *kwargs.values())):
        raise SecurityError("a width is too large")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
