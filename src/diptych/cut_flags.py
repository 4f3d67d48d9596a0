"""The flags that say how workers are cut into ranks: made here, since they are the same for every role.

@takes_cuts("prefill", "decode")       --prefill-tp, --prefill-pp, ..., --decode-block-size
def command(..., cuts): ...            cuts["prefill"] is a CutSettings
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

from typer import Option

from diptych.core.settings import CutSettings, ParallelSettings

PANEL = "Cut into ranks"
SIZES = {
    "tp": ("tensor", "Tensor-parallel ranks{of}."),
    "pp": ("pipeline", "Pipeline stages{of}."),
    "dp": ("data", "Data-parallel ranks of the attention{of}."),
    "ep": ("expert", "Ranks that share the experts{of}: 1, or tp x dp."),
}
BLOCK_SIZE = "block_size"

Command = Callable[..., None]


def takes_cuts(*roles: str) -> Callable[[Command], Command]:
    """Replace a command's parameter `cuts` by flags for each role; "" is a command's own role, whose flags have no
    prefix (and whose --block-size is the command's)."""
    names = {role: f"{role}_" if role else "" for role in roles}

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            cuts = {role: _take(values, prefix) for role, prefix in names.items()}
            command(**values, cuts=cuts)

        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "cuts"]
        made = [parameter for role, prefix in names.items() for parameter in _parameters(role, prefix)]
        wrapper.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
        return wrapper

    return decorate


def _parameters(role: str, prefix: str) -> list[inspect.Parameter]:
    """One for each flag of a role, as typer reads them."""
    of = f" of a {role} worker" if role else ""
    flags: list[tuple[str, Any, str, int | None]] = [
        (name, int, text.format(of=of), 1) for name, (_, text) in SIZES.items()
    ]
    if role:
        flags.append((BLOCK_SIZE, int | None, f"Tokens per KV block{of}, if not --block-size.", None))
    return [
        inspect.Parameter(
            prefix + name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, Option(min=1, help=text, rich_help_panel=PANEL)],
        )
        for name, kind, text, default in flags
    ]


def _take(values: dict[str, Any], prefix: str) -> CutSettings:
    """The values of one role's flags, out of a command's. Raises ConfigError for a cut that makes no sense."""
    sizes = {field: values.pop(prefix + name) for name, (field, _) in SIZES.items()}
    return CutSettings(
        parallel=ParallelSettings(**sizes), block_size=values.pop(prefix + BLOCK_SIZE) if prefix else None
    )
