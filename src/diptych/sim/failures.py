"""Why an accepted request may fail although somebody could serve it: the whole list.

Anything else is a violation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from diptych.core.fleet import WorkerState
from diptych.policy.deadlines import TOTAL_TIMEOUT, Deadlines, Wait
from diptych.policy.recovery import POISON, POISON_CRASHES
from diptych.sim.clients import Client
from diptych.sim.violation import Violation

if TYPE_CHECKING:
    from diptych.sim.world import World

CANARY_SECONDS = 5.0  # for those of a few lives, in the time that messages and steps take here

Allowed = Callable[["World", Client], bool]


def _engine_at_fault(world: World, client: Client) -> bool:
    """An engine was made to fail in a step with it."""
    return client.engine_faults > 0


def _nobody_ready(world: World, client: Client) -> bool:
    """The router knows of no worker that is ready."""
    return all(view.state is not WorkerState.READY for view in world.router.policy.workers.values())


def _many_died(world: World, client: Client) -> bool:
    """As many workers died, or seemed to, or had engines that failed with it, as make a request suspect."""
    return world.losses + client.engine_faults >= POISON_CRASHES


def _deserted_for_long(world: World, client: Client) -> bool:
    """Since its last token, and in all, no worker was ready for as long as a stream waits for one; those that had come
    back were gone again before its turn came. (A worker that is ready serves once a canary has shown that it can.)"""
    return world.router.deserted - client.deserted_before > Deadlines().queue - CANARY_SECONDS


def _clock_leapt(world: World, client: Client) -> bool:
    """For the router, it has waited for longer than anybody may."""
    return world.router.clock_ahead > 0


ALLOWED: dict[str, tuple[Allowed, ...]] = {
    "engine_corrupt": (_engine_at_fault,),
    "no_worker": (_nobody_ready,),
    POISON: (_many_died,),
    TOTAL_TIMEOUT: (_clock_leapt,),
    **{wait.code: (_clock_leapt,) for wait in Wait},
    Wait.QUEUE.code: (_clock_leapt, _deserted_for_long),
}


def check_failure(world: World, client: Client) -> None:
    """Raises Violation unless the client's error is one that this client may get now."""
    error = client.error
    if error is not None and not any(reason(world, client) for reason in ALLOWED.get(error.code, ())):
        raise Violation(
            f"{client.request_id} fails with {error.code} ({error.message}) after {client.attempts} attempts, "
            "although somebody could serve it"
        )
