"""A history as a person would tell it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diptych.core.events import (
    AbortRequested,
    BlocksCached,
    FirstTokenMade,
    HandoffComplete,
    HandoffFailed,
    LinkLost,
    PrefillRequested,
    RequestFailed,
    ReserveRequested,
    RowsDropped,
    ServeRequested,
    StepFailed,
    StepFinished,
    Tick,
    TicketGranted,
    TokensMade,
    WorkerUpdated,
)
from diptych.sim.scenario import Scenario


@dataclass(frozen=True, slots=True)
class _Line:
    at: float
    text: str
    is_event: bool = False


class Story:
    """Lines in order of time: what happened, and (only the last of them are told) every event that a policy took."""

    def __init__(self) -> None:
        self._lines: list[_Line] = []

    def add(self, at: float, text: str) -> None:
        self._lines.append(_Line(at, text))

    def add_event(self, at: float, name: str, event: object) -> None:
        """A policy takes an event. (Reports and ticks explain little.)"""
        if not isinstance(event, BlocksCached | Tick | WorkerUpdated):
            self._lines.append(_Line(at, f"    {name} {_in_words(event)}", is_event=True))

    def tell(self, last_events: int = 25) -> Iterator[str]:
        """The lines. Of the events there are the last few."""
        skipped = sum(line.is_event for line in self._lines) - last_events
        for line in self._lines:
            if line.is_event and skipped > 0:
                skipped -= 1
                continue
            yield f"{line.at:9.3f} s  {line.text}"


def cast(scenario: Scenario) -> Iterator[str]:
    """Who takes part, and how fast things go."""
    for worker in scenario.workers:
        kind = "supervised" if worker.supervised else "joined"
        layout = worker.cut(scenario.model).layout
        blocks = f"{worker.num_blocks} KV blocks of {worker.block_size} tokens"
        yield f"{worker.worker_id}, on host {worker.host}, {kind}, has {blocks}{layout.cut and f', cut {layout.cut}'}"
    yield (
        f"a message takes about {scenario.latency:g} s, a step {scenario.cost.step:g} s; at most "
        f"{scenario.max_sequences} sequences and {scenario.max_batch_tokens} tokens to a step"
    )


def _in_words(event: object) -> str:
    match event:
        case ServeRequested(request, outputs):
            return f"is to serve {request.request_id} from token {len(outputs)} on"
        case ReserveRequested(request, _):
            return f"is to reserve blocks for {request.request_id}"
        case PrefillRequested(request, claims, _):
            return f"is to prefill {request.request_id} for {claims.worker_id}"
        case AbortRequested(request_id):
            return f"is to let go of {request_id}"
        case TicketGranted(worker_id, request_id):
            return f"gets a ticket of {worker_id} for {request_id}"
        case FirstTokenMade(worker_id, output):
            return f"gets {output.request_id}[{output.index}], a first token, from {worker_id}"
        case TokensMade(worker_id, outputs):
            tokens = ", ".join(f"{output.request_id}[{output.index}]" for output in outputs)
            return f"gets {tokens} from {worker_id}"
        case RequestFailed(worker_id, request_id, code):
            return f"hears from {worker_id} that {request_id} has failed: {code}"
        case HandoffComplete(request_id):
            return f"takes over {request_id}"
        case HandoffFailed(request_id, code, message):
            return f"hears that the hand-off of {request_id} has failed: {code} ({message})"
        case LinkLost(worker_id, request_ids):
            return f"has lost its data connection to {worker_id}, with {', '.join(request_ids)}"
        case StepFinished(samples):
            return f"has finished a step with {len(samples)} sequences"
        case StepFailed(code, _, request_ids):
            return f"could not finish a step: {code} {', '.join(request_ids)}"
        case RowsDropped(request_ids):
            return f"goes on with a step without {', '.join(request_ids)}"
    names = (str(getattr(event, name)) for name in ("worker_id", "request_id") if hasattr(event, name))
    return f"takes {type(event).__name__} {' '.join(names)}".strip()
