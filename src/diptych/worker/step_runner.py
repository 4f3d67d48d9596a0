"""Runs engine steps on a thread of their own, one at a time, so that the event loop stays free."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from diptych.chaos.failpoints import failpoint
from diptych.core.actions import RunStep
from diptych.core.errors import DiptychError, EngineCorrupt, EngineLost, StepAbandoned
from diptych.core.events import StepFailed, StepFinished, StepGivenUp
from diptych.core.ports import Engine

log = logging.getLogger(__name__)

PushLayer = Callable[[RunStep, int], None]
Outcome = StepFinished | StepFailed | StepGivenUp
Report = Callable[[Outcome], None]


class StepRunner:
    """The compute thread. `push_layer(step, layer)` is called on it as each layer's KV is written;
    `report` (called on it too) takes the outcome back, and `lost` the news that there will be no other.

    All but `join` are for one thread."""

    def __init__(
        self, engine: Engine, push_layer: PushLayer, report: Report, lost: Callable[[EngineLost], None]
    ) -> None:
        self._engine = engine
        self._push_layer = push_layer
        self._report = report
        self._lost = lost
        self._given_up = threading.Event()  # of the latest step: each has its own, so that no other hears it late
        self._steps: queue.SimpleQueue[tuple[RunStep, threading.Event] | str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def run(self, step: RunStep) -> None:
        """Queue a step; there is never more than one."""
        self._given_up = threading.Event()
        self._steps.put((step, self._given_up))

    def give_up(self) -> None:
        """Have the engine break the latest step off, if it runs and can."""
        self._given_up.set()

    def forget(self, request_id: str) -> None:
        """Have the engine drop a request, between steps."""
        self._steps.put(request_id)

    def end(self) -> None:
        """Give up the step at hand, and have the thread end after what was queued before."""
        self.give_up()
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

    def _step(self, step: RunStep, given_up: threading.Event) -> Outcome:
        on_layer = (lambda layer: self._push_layer(step, layer)) if step.pushes else None
        began = time.perf_counter()
        try:
            failpoint("step.started")
            samples = self._engine.step(step.batch, on_layer, given_up)
            failpoint("step.finished")
        except StepAbandoned:
            return StepGivenUp()
        except EngineCorrupt as error:
            return StepFailed(error.code, error.message, error.request_ids)
        except EngineLost:
            raise
        except DiptychError as error:
            return StepFailed(error.code, error.message)
        except Exception as error:  # the edge of the process: whatever an engine raises ends requests, not the worker
            return StepFailed("engine_failed", f"{type(error).__name__}: {error}")
        return StepFinished(tuple(samples), time.perf_counter() - began)
