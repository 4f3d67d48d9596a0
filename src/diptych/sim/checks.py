"""What must hold at every moment, and at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from diptych.core.actions import RunStep
from diptych.core.blocks import BlockId
from diptych.core.ticket import TicketClaims
from diptych.sim.violation import Violation

if TYPE_CHECKING:
    from diptych.sim.life import Life
    from diptych.sim.router import Router
    from diptych.sim.world import World


Place = tuple[int, BlockId]  # a block of one data-parallel rank

SLOW_STEP = 0.1  # seconds; with slower steps, a crowded worker may pass a deadline of the router's without any fault


def check_tickets(life: Life) -> None:
    """No two tickets give leave to write to one block, such a block is not free, and nobody sends it on."""
    owners: dict[Place, str] = {}
    for place, request_id in _writable(life):
        if place in owners:
            raise Violation(f"{_named(life, place)} may be written for {owners[place]} and for {request_id} at once")
        owners[place] = request_id
    if not owners:
        return
    for reader, places in life.reading.values():
        for place in places & owners.keys():
            raise Violation(f"{_named(life, place)} is read for {reader} while {owners[place]} is written to it")
    if life.blocks_used < len(owners):
        names = ", ".join(dict.fromkeys(owners.values()))
        raise Violation(f"{life.name} counts blocks as free that {names} may still be written to")


def check_grant(life: Life, claims: TicketClaims) -> None:
    """What is present of a prompt already is of the same tenant; what will be written is this tenant's from now on."""
    places = [(claims.data_rank, block) for block in claims.blocks]
    _check_salts(life, claims.request_id, places[: claims.first_block], claims.salt)
    life.salts.update(dict.fromkeys(places[claims.first_block :], claims.salt))


def check_step(life: Life, step: RunStep) -> None:
    """A step reads no page of another tenant and no block that somebody else may be writing, and writes none that
    somebody else reads or writes."""
    writable = dict(_writable(life))
    reading = {place: request_id for request_id, places in life.reading.values() for place in places}
    size = life.engine.layout.block_size
    for row in step.batch.rows:
        request = row.sequence.request
        places = [(row.sequence.data_rank, block) for block in row.sequence.block_table]
        for place in places:
            if place in writable:
                raise Violation(
                    f"{life.name} computes {request.request_id} with {_named(life, place)}, "
                    f"which may still be written for {writable[place]}"
                )
        written = places[row.start // size : (row.end - 1) // size + 1]
        for place in written:
            if reading.get(place, request.request_id) != request.request_id:
                raise Violation(
                    f"{life.name} computes {request.request_id} into {_named(life, place)}, "
                    f"which is still being read for {reading[place]}"
                )
        _check_salts(life, request.request_id, places[: row.start // size], request.cache_salt)
        life.salts.update(dict.fromkeys(written, request.cache_salt))


def _writable(life: Life) -> Iterator[tuple[Place, str]]:
    """The blocks that tickets give leave to write to, each with the request that it is for."""
    for request_id, ticket in life.receiver.tickets.out.items():
        for block in ticket.writable:
            yield (ticket.claims.data_rank, block), request_id


def _named(life: Life, place: Place) -> str:
    rank, block = place
    return f"block {block} of {life.name}" + (f" (data-parallel rank {rank})" if len(life.ranks) > 1 else "")


def _check_salts(life: Life, request_id: str, places: Iterable[Place], salt: str) -> None:
    for place in places:
        if life.salts.get(place) != salt:
            raise Violation(f"{life.name} serves {request_id} from {_named(life, place)}, which is another tenant's")


def check_awaited(router: Router) -> None:
    """Nobody waits, until some deadline, for a worker that is not there."""
    for request_id, live in router.policy.live.items():
        if live.awaited is not None and live.awaited not in router.links:
            raise Violation(f"{request_id} waits for {live.awaited}, which the router has lost")


def check_over(life: Life, request_ids: Iterable[str]) -> None:
    """A worker that has been told everything about a request that is over has let go of it."""
    for request_id in request_ids:
        for attempt_id in life.policy.request_ids:
            if attempt_id.partition("~")[0] == request_id:
                raise Violation(f"{life.name} goes on with {attempt_id}, which is over: nobody has told it to stop")


def check_ended(world: World) -> None:
    """All faults are over, and computing has had its time: nobody waits any more."""
    for client in world.clients.values():
        if not client.over:
            raise Violation(f"{client.request_id} has not ended after {world.kernel.now:.1f} s; {client.describe()}")
        if client.attempts > client.request.race and not world.outcome.faults and world.scenario.cost.step < SLOW_STEP:
            raise Violation(f"{client.request_id} took {client.attempts} attempts, although nothing went wrong")
    if world.router.policy.live:
        raise Violation(f"the router still has {', '.join(world.router.policy.live)}")


def check_empty(world: World) -> None:
    """Nothing happens any more, and nothing is left anywhere."""
    for spec in world.scenario.workers:
        life = world.lives[spec.worker_id]
        if not life.accepts or world.router.links.get(spec.worker_id) is None:
            raise Violation(f"{life.name} has not come back")
        _check_empty(life)


def _check_empty(life: Life) -> None:
    life.policy.check_integrity()
    leftovers = {
        "blocks in use": life.blocks_used,
        "requests": 0 if life.policy.idle else ", ".join(life.policy.request_ids) or "nameless",
        "tickets out": ", ".join(life.receiver.tickets.out),
        "pushes": ", ".join(push for link in life.links.values() for push in link.pushes),
        "pages to read": len(life.reading),
    }
    left = [f"{name}: {count}" for name, count in leftovers.items() if count]
    if left:
        raise Violation(f"when all is over, {life.name} still has {'; '.join(left)}")
