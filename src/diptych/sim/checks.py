"""What must hold at every moment, and at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from diptych.core.actions import RunStep
from diptych.core.blocks import BlockId
from diptych.core.ticket import TicketClaims
from diptych.sim.violation import Violation

if TYPE_CHECKING:
    from diptych.sim.life import Life
    from diptych.sim.router import Router
    from diptych.sim.world import World


SLOW_STEP = 0.1  # seconds; with slower steps, a crowded worker may pass a deadline of the router's without any fault


def check_tickets(life: Life) -> None:
    """No two tickets give leave to write to one block, such a block is not free, and nobody sends it on."""
    tickets = life.receiver.tickets.out
    if not tickets:
        return
    owners: dict[BlockId, str] = {}
    for request_id, ticket in tickets.items():
        for block in ticket.writable:
            if block in owners:
                raise Violation(
                    f"block {block} of {life.name} may be written for {owners[block]} and for {request_id} at once"
                )
            owners[block] = request_id
    for reader, blocks in life.reading.values():
        for block in blocks & owners.keys():
            raise Violation(
                f"block {block} of {life.name} is read for {reader} and written for {owners[block]} at once"
            )
    if life.policy.pool.num_used < len(owners):
        raise Violation(f"{life.name} counts blocks as free that {', '.join(tickets)} may still be written to")


def check_grant(life: Life, claims: TicketClaims) -> None:
    """What is present of a prompt already is of the same tenant; what will be written is this tenant's from now on."""
    _check_salts(life, claims.request_id, claims.blocks[: claims.first_block], claims.salt)
    life.salts.update(dict.fromkeys(claims.blocks[claims.first_block :], claims.salt))


def check_step(life: Life, step: RunStep) -> None:
    """A step reads no page of another tenant and no block that somebody else may be writing, and writes none that
    somebody else reads or writes."""
    writable = {
        block: request_id for request_id, ticket in life.receiver.tickets.out.items() for block in ticket.writable
    }
    reading = {block: request_id for request_id, blocks in life.reading.values() for block in blocks}
    size = life.engine.layout.block_size
    for row in step.batch.rows:
        request, table = row.sequence.request, row.sequence.block_table
        for block in table:
            if block in writable:
                raise Violation(
                    f"{life.name} computes {request.request_id} with block {block}, "
                    f"which may still be written for {writable[block]}"
                )
        written = table[row.start // size : (row.end - 1) // size + 1]
        for block in written:
            if reading.get(block, request.request_id) != request.request_id:
                raise Violation(
                    f"{life.name} computes {request.request_id} into block {block}, "
                    f"which is still being read for {reading[block]}"
                )
        _check_salts(life, request.request_id, table[: row.start // size], request.cache_salt)
        life.salts.update(dict.fromkeys(written, request.cache_salt))


def _check_salts(life: Life, request_id: str, blocks: Iterable[BlockId], salt: str) -> None:
    for block in blocks:
        if life.salts.get(block) != salt:
            raise Violation(f"{life.name} serves {request_id} from block {block}, which is another tenant's")


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
        if client.attempts > 1 and not world.outcome.faults and world.scenario.cost.step < SLOW_STEP:
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
        "blocks in use": life.policy.pool.num_used,
        "requests": 0 if life.policy.idle else ", ".join(life.policy.request_ids) or "nameless",
        "tickets out": ", ".join(life.receiver.tickets.out),
        "pushes": ", ".join(push for link in life.links.values() for push in link.pushes),
        "pages to read": len(life.reading),
    }
    left = [f"{name}: {count}" for name, count in leftovers.items() if count]
    if left:
        raise Violation(f"when all is over, {life.name} still has {'; '.join(left)}")
