"""Making a failing scenario smaller: leave things out, one at a time, for as long as it still fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from diptych.sim.scenario import Scenario
from diptych.sim.world import World

LUCK = 4  # seeds that every smaller scenario is tried with


def shrink(scenario: Scenario, tries: int = 400) -> Scenario:
    """A scenario with a violation in it, and as little else as `tries` runs can find out."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _with_less(scenario):
            found = _failing(candidate)
            tries -= LUCK
            if found is not None:
                scenario, smaller = found, True
                break
            if tries <= 0:
                return scenario
    return scenario


def _failing(scenario: Scenario) -> Scenario | None:
    """This scenario, perhaps with other luck, if that still fails. (With something left out, messages take other
    times than before.)"""
    for luck in range(LUCK):
        candidate = replace(scenario, seed=scenario.seed + luck)
        if World(candidate).run().violation is not None:
            return candidate
    return None


def _with_less(scenario: Scenario) -> Iterator[Scenario]:
    """The same with one thing left out, in order of how much that explains."""
    for index in range(len(scenario.faults)):
        yield replace(scenario, faults=scenario.faults[:index] + scenario.faults[index + 1 :])
    for index in range(len(scenario.requests)):
        if len(scenario.requests) > 1:
            yield replace(scenario, requests=scenario.requests[:index] + scenario.requests[index + 1 :])
    for worker in scenario.workers:
        others = tuple(other for other in scenario.workers if other is not worker)
        concerned = any(worker.worker_id in (fault.worker, fault.other) for fault in scenario.faults)
        if others and not concerned:
            yield replace(scenario, workers=others)
    for index, request in enumerate(scenario.requests):
        if request.cancel_after is not None:
            patient = (replace(request, cancel_after=None),)
            yield replace(scenario, requests=scenario.requests[:index] + patient + scenario.requests[index + 1 :])
