"""The journal: every event a policy object took and every action it ordered, one JSON line each.

Enough to see why something was done, and to feed the events back to policy and compare (replay). Of a push it
keeps which tokens went where: the byte ranges follow from that and the block tables, and are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from diptych.core.actions import PushPages, RunStep
from diptych.core.errors import ConfigError, DiptychError, in_words


class Journal(Protocol):
    def record(self, now: float, event: object, actions: Sequence[object]) -> None: ...

    def close(self) -> None: ...


class NoJournal:
    """Keeps nothing."""

    def record(self, now: float, event: object, actions: Sequence[object]) -> None:
        pass

    def close(self) -> None:
        pass


class FileJournal:
    """Appends lines `{"t": seconds, "event": {...}, "actions": [...]}` to a file, flushed at each line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._encoder = msgspec.json.Encoder(enc_hook=_plain)

    def record(self, now: float, event: object, actions: Sequence[object]) -> None:
        line = {"t": now, "event": _named(event), "actions": [_named(action) for action in actions]}
        self._file.write(self._encoder.encode(line) + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def open_journal(path: str | None) -> Journal:
    """A journal that writes to `path`, or one that keeps nothing. Raises ConfigError if it cannot be written."""
    try:
        return NoJournal() if path is None else FileJournal(Path(path))
    except OSError as error:
        raise ConfigError(f"--journal {path}: {in_words(error)}") from error


def _named(thing: object) -> dict[str, Any]:
    """A dataclass as a dict that starts with the name of its kind."""
    kind = type(thing).__name__
    match thing:
        case RunStep(batch, pushes):
            return {"kind": kind, "batch": batch, "pushes": [_named(push) for push in pushes]}
        case PushPages(request_id, claims, plan):
            return {
                "kind": kind,
                "request_id": request_id,
                "target": claims.worker_id,
                "first_token": plan.first_token,
                "num_tokens": plan.num_tokens,
                "num_ranges": sum(len(transfer.ranges) for transfer in plan.layers),
            }
    fields = getattr(thing, "__dataclass_fields__", ())
    return {"kind": kind, **{name: getattr(thing, name) for name in fields}}


def _plain(thing: object) -> object:
    if isinstance(thing, DiptychError):
        return {"code": thing.code, "message": thing.message}
    raise TypeError(f"the journal cannot write a {type(thing).__name__}")
