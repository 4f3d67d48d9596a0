"""A worker that writes down when things happened, for `bench.overlap`: otherwise it is the one that serves.

Four probes: around the engine (when a step began and ended, and when each layer's KV was there), inside it (when the
last layer was computed), around pushes (when the first one came), and around the receiver's tickets (when pages were
verified, and when a hand-off was complete). Times are of the machine's monotonic clock, which all processes share; they
are kept in memory and written at the end.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.bench.metrics import Fields
from diptych.core.fleet import ModelInfo
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.ports import AllocateKV, Engine, OnLayer, OnLost, Unwanted
from diptych.core.request import SampledToken
from diptych.core.sequence import Batch
from diptych.core.settings import WorkerSettings
from diptych.engine import scripted
from diptych.engine.scripted import ScriptedEngine, ScriptedModel
from diptych.transfer import frames, incoming, receiver
from diptych.transfer.sender import PushLink
from diptych.worker.main import run_worker

SCRIPTED_LAYERS = 8

_Closed = tuple[incoming.Incoming | None, incoming.Ending | None]


@dataclass(frozen=True, slots=True)
class Records:
    """What a worker saw, in order of time."""

    steps: list[Fields]
    verified: list[Fields]
    complete: dict[str, float]
    computed: list[float]  # when the last layer was, attention and MLP included
    pushed: dict[str, float]  # when the first pages of a request could leave


class TimedEngine:
    """An engine whose every step is recorded. At its end it writes `records` to a file."""

    def __init__(self, engine: Engine, records: Records, path: Path) -> None:
        self._engine = engine
        self._records = records
        self._path = path

    @property
    def model(self) -> ModelInfo:
        return self._engine.model

    @property
    def layout(self) -> KVLayout:
        return self._engine.layout

    def allocate_kv(self, num_blocks: int, allocate: AllocateKV) -> tuple[KVMemory, ...]:
        return self._engine.allocate_kv(num_blocks, allocate)

    def step(
        self, batch: Batch, on_layer: OnLayer | None = None, unwanted: Unwanted | None = None
    ) -> list[SampledToken | None]:
        layers: list[float] = []

        def timed(layer: int) -> None:
            layers.append(time.monotonic())
            if on_layer is not None:
                on_layer(layer)

        begin = time.monotonic()
        samples = self._engine.step(batch, timed, unwanted)
        end = time.monotonic()
        computed = self._records.computed[-1] if any(row.samples for row in batch.rows) else end
        rows = [(row.sequence.request_id, row.start, row.end) for row in batch.rows]
        self._records.steps.append({"begin": begin, "layers": layers, "computed": computed, "end": end, "rows": rows})
        return samples

    def forget(self, request_id: str) -> None:
        self._engine.forget(request_id)

    def watch(self, lost: OnLost) -> None:
        self._engine.watch(lost)

    def close(self) -> None:
        self._engine.close()
        seen = self._records
        content = {"steps": seen.steps, "pushed": seen.pushed, "verified": seen.verified, "complete": seen.complete}
        self._path.write_text(json.dumps(content), encoding="utf-8")


def timed_book(records: Records) -> type[incoming.TicketBook]:
    """A receiver's book of tickets that records what was verified, and when a hand-off was complete."""

    class TimedBook(incoming.TicketBook):
        def mark(self, ticket: incoming.Incoming, frame: frames.Pages) -> None:
            super().mark(ticket, frame)
            # Between equal layouts, a group is a block.
            where = {"first_block": frame.first_group, "num_blocks": frame.num_groups, "time": time.monotonic()}
            records.verified.extend({"request": frame.request_id, "layer": layer, **where} for layer in frame.layers)

        def leave(self, ticket: incoming.Incoming) -> incoming.Ending | None:
            return self._noted(ticket, super().leave(ticket))

        def close(self, frame: frames.Close, writer: incoming.Writer) -> _Closed:
            ticket, ending = super().close(frame, writer)
            return ticket, self._noted(ticket, ending)

        def _noted(self, ticket: incoming.Incoming | None, ending: incoming.Ending | None) -> incoming.Ending | None:
            if ticket is not None and ending is incoming.Ending.COMPLETE:
                records.complete[ticket.claims.request_id] = time.monotonic()
            return ending

    return TimedBook


def run(settings: WorkerSettings, path: Path) -> None:
    """The life of one worker, in a process of its own."""
    if settings.cpu.cores:
        os.sched_setaffinity(0, settings.cpu.cores)
    records = Records([], [], {}, [], {})
    push = PushLink.push

    def timed_push(link: PushLink, request_id: str, *arguments: Any) -> None:
        records.pushed.setdefault(request_id, time.monotonic())
        push(link, request_id, *arguments)

    PushLink.push = timed_push  # type: ignore[method-assign,assignment]
    receiver.TicketBook = timed_book(records)  # type: ignore[misc]  # the probe
    asyncio.run(run_worker(settings, lambda _: TimedEngine(_load(settings, records), records, path)))


def _load(settings: WorkerSettings, records: Records) -> Engine:
    """The engine, with a probe where its last layer has been computed and only head and sampling are left."""
    engine = settings.engine
    if engine.kind == "scripted":
        choose = scripted._choose

        def timed_choose(*arguments: Any) -> Any:
            records.computed.append(time.monotonic())  # all KV has been read, as attention would
            return choose(*arguments)

        scripted._choose = timed_choose
        script = ScriptedModel(max_model_len=engine.max_model_len or 4096, num_layers=SCRIPTED_LAYERS)
        return ScriptedEngine(script, sleep=time.sleep)
    import torch

    from diptych.engine.torch_engine.model import Decoder
    from diptych.engine.torch_engine.runner import TorchEngine

    forward = Decoder.forward

    def timed_forward(*arguments: Any) -> Any:
        hidden = forward(*arguments)
        records.computed.append(time.monotonic())
        return hidden

    Decoder.forward = timed_forward  # type: ignore[method-assign]
    torch.set_num_threads(settings.cpu.threads)
    return TorchEngine.load(engine.model, max_model_len=engine.max_model_len)
