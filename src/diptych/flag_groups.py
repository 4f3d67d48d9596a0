"""Flags in groups: a command's parameter whose type is a dataclass stands for one flag for each of its fields.

@dataclass
class Limits:
    most: Annotated[int, Option(min=1, help="...")] = 8          --most

@takes_groups
def command(limits: Limits): ...
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

Command = Callable[..., None]


def takes_groups(command: Command) -> Command:
    """The same command, with flags as typer reads them."""
    signature = inspect.signature(command, eval_str=True)
    groups = {name: own.annotation for name, own in signature.parameters.items() if is_dataclass(own.annotation)}

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **made)

    def parameters() -> Iterator[inspect.Parameter]:
        for name, own in signature.parameters.items():
            if name in groups:
                yield from _flags(groups[name])
            else:
                yield own.replace(kind=inspect.Parameter.KEYWORD_ONLY)

    wrapper.__signature__ = signature.replace(parameters=list(parameters()))  # type: ignore[attr-defined]
    return wrapper


def _flags(group: Any) -> Iterator[inspect.Parameter]:
    annotations = typing.get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        kind = inspect.Parameter.KEYWORD_ONLY
        yield inspect.Parameter(field.name, kind, default=default, annotation=annotations[field.name])
