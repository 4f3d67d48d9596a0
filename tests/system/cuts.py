"""Workers cut into ranks: "tp4 ep4 block32" and the flags that say the same."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby


def cut_flags(cut: str, role: str = "") -> Iterator[str]:
    """The flags of `serve` for a role, or of `worker`."""
    prefix = f"{role}-" if role else ""
    for item in cut.split():
        name, size = ("".join(part) for _, part in groupby(item, str.isdigit))
        yield f"--{prefix}{'block-size' if name == 'block' else name}"
        yield size


def ranks_of(cut: str) -> str:
    """As the fleet shows it: without block sizes and ones."""
    return " ".join(item for item in cut.split() if not item.startswith("block") and not item.endswith("p1"))
