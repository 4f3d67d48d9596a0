"""Runs engine steps on a thread of their own, one at a time, so that the event loop stays free."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable

from diptych.chaos.failpoints import failpoint
from diptych.core.actions import PushPages, RunStep
from diptych.core.errors import DiptychError, EngineCorrupt, EngineLost
from diptych.core.events import RowsDropped, StepFailed, StepFinished
from diptych.core.ports import Engine
from diptych.core.sequence import Batch

log = logging.getLogger(__name__)

PushLayer = Callable[[PushPages, int], None]
Report = Callable[[RowsDropped | StepFinished | StepFailed], None]


class UnwantedRows:
    """Implements core.ports.Unwanted for one step: the loop's thread adds, the compute thread takes."""

    def __init__(self, report: Callable[[RowsDropped], None]) -> None:
        self.gone: set[str] = set()  # let go; only for the compute thread
        self._report = report
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._untaken: set[str] = set()

    def add(self, request_ids: Iterable[str]) -> None:
        with self._lock:
            self._untaken.update(request_ids)
            self._news.set()

    def take(self) -> frozenset[str]:
        """See core.ports.Unwanted, as for the rest."""
        if not self._news.is_set():
            return frozenset()
        with self._lock:
            taken = frozenset(self._untaken)
            self._untaken.clear()
            self._news.clear()
        return taken

    def let_go(self, request_ids: Iterable[str]) -> None:
        found = tuple(request_ids)
        self.gone.update(found)
        self._report(RowsDropped(found))

    def wait(self, seconds: float) -> None:
        self._news.wait(seconds)


class StepRunner:
    """The compute thread. `push_layer(push, layer)` is called on it as each layer's KV is written, for each push of the
    step; `report` (called on it too) takes the outcome back, and `lost` the news that there will be no other.

    All but `join` are for one thread."""

    def __init__(
        self, engine: Engine, push_layer: PushLayer, report: Report, lost: Callable[[EngineLost], None]
    ) -> None:
        self._engine = engine
        self._push_layer = push_layer
        self._report = report
        self._lost = lost
        self._latest = RunStep(Batch(()))
        self._unwanted = UnwantedRows(report)  # of the latest step: each has its own, so that no other hears it late
        self._steps: queue.SimpleQueue[tuple[RunStep, UnwantedRows] | str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def run(self, step: RunStep) -> None:
        """Queue a step; there is never more than one."""
        self._latest, self._unwanted = step, UnwantedRows(self._report)
        self._steps.put((step, self._unwanted))

    def drop(self, request_ids: Iterable[str]) -> None:
        """Have the engine go on without these rows of the latest step, if it still runs, and the engine can."""
        self._unwanted.add(request_ids)

    def forget(self, request_id: str) -> None:
        """Have the engine drop a request, between steps."""
        self._steps.put(request_id)

    def end(self) -> None:
        """Give up the step at hand, and have the thread end after what was queued before."""
        self.drop(row.sequence.request_id for row in self._latest.batch.rows)
        self._steps.put(None)

    def join(self) -> None:
        """Wait for its end."""
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while (order := self._steps.get()) is not None:
            try:
                if isinstance(order, str):
                    self._engine.forget(order)
                else:
                    self._report(self._step(*order))
            except EngineLost as error:
                self._lost(error)
            except Exception as error:  # a bug: still, nobody may wait for a thread that is gone
                log.exception("the compute thread broke")
                self._lost(EngineLost(f"{type(error).__name__}: {error}"))

    def _step(self, step: RunStep, unwanted: UnwantedRows) -> StepFinished | StepFailed:
        def on_layer(layer: int) -> None:
            for push in step.pushes:
                if push.request_id not in unwanted.gone:
                    self._push_layer(push, layer)

        began = time.perf_counter()
        try:
            failpoint("step.started")
            samples = self._engine.step(step.batch, on_layer if step.pushes else None, unwanted)
            failpoint("step.finished")
        except EngineCorrupt as error:
            return StepFailed(error.code, error.message, error.request_ids)
        except EngineLost:
            raise
        except DiptychError as error:
            return StepFailed(error.code, error.message)
        except Exception as error:  # the edge of the process: whatever an engine raises ends requests, not the worker
            return StepFailed("engine_failed", f"{type(error).__name__}: {error}")
        return StepFinished(tuple(samples), time.perf_counter() - began)
