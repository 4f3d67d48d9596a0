"""Why an accepted request may fail although somebody could serve it: the whole list.

Anything else is a violation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from diptych.core.fleet import WorkerState
from diptych.policy.recovery import FAILED_HANDOFFS, LOST_WORKER, MAX_ATTEMPTS
from diptych.sim.clients import Client
from diptych.sim.violation import Violation

if TYPE_CHECKING:
    from diptych.sim.world import World

Allowed = Callable[["World", Client], bool]


def _engine_at_fault(world: World, client: Client) -> bool:
    """An engine was made to fail a step that the request was part of."""
    return client.engine_faults > 0


def _nobody_ready(world: World, client: Client) -> bool:
    """The router knows of no worker that is ready."""
    return all(view.state is not WorkerState.READY for view in world.router.policy.workers.values())


def _attempts_used_up(world: World, client: Client) -> bool:
    """It has been tried as often as a request may be."""
    return client.attempts >= MAX_ATTEMPTS


def _outgrew_the_pool(world: World, client: Client) -> bool:
    """No: pools hold every request of full length (`worker.main` sees to that)."""
    return False


ALLOWED: dict[str, tuple[Allowed, ...]] = {
    "engine_corrupt": (_engine_at_fault,),
    "engine_failed": (_engine_at_fault,),
    "no_worker": (_nobody_ready,),
    "kv_exhausted": (_outgrew_the_pool,),
    LOST_WORKER: (_nobody_ready, _attempts_used_up),
    **dict.fromkeys(sorted(FAILED_HANDOFFS), (_attempts_used_up, _nobody_ready)),
}


def check_failure(world: World, client: Client) -> None:
    """Raises Violation unless the client's error is one that this client may get now."""
    error = client.error
    if error is not None and not any(reason(world, client) for reason in ALLOWED.get(error.code, ())):
        raise Violation(
            f"{client.request_id} fails with {error.code} ({error.message}) after {client.attempts} attempts, "
            "although somebody could serve it"
        )
