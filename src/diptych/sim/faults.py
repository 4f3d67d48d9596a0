"""How each kind of fault strikes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from diptych.sim import messages
from diptych.sim.network import ROUTER, Way
from diptych.sim.scenario import Fault, FaultKind

if TYPE_CHECKING:
    from diptych.sim.life import Life
    from diptych.sim.world import World


def strike(world: World, fault: Fault) -> None:
    """Let a fault happen now, if there is anything for it to happen to; its end is planned."""
    if not fault.worker:
        fault = replace(fault, worker=_busy_worker(world, fault.other))
    if _STRIKE[fault.kind](world, fault):
        world.count_fault(fault.kind)


def _busy_worker(world: World, other: str) -> str:
    """One that has something to lose, or any."""
    lives = [life for life in world.lives.values() if life.worker_id != other]
    busy = [life for life in lives if life.process.alive and not life.policy.idle]
    names = sorted(life.worker_id for life in busy or lives)
    return world.rng.choice(names) if names else ""


def _life(world: World, fault: Fault) -> Life | None:
    """The one it concerns, if it is up."""
    life = world.lives.get(fault.worker)
    return life if life is not None and life.process.alive else None


def _holdings(life: Life) -> str:
    requests = ", ".join(life.policy.request_ids) or "nothing"
    return f"{requests} ({life.blocks_used} blocks)"


def _kill(world: World, fault: Fault) -> bool:
    life = _life(world, fault)
    if life is None:
        return False
    life.tell("is killed while it holds {}", _holdings(life))
    world.kill(life, fault.seconds)
    return True


def _freeze(world: World, fault: Fault) -> bool:
    life = _life(world, fault)
    if life is None or life.process.frozen:
        return False
    life.tell("is frozen for {:.3f} s while it holds {}", fault.seconds, _holdings(life))
    life.process.freeze()
    world.router.watch(life.worker_id)

    def thaw() -> None:
        if life.process.alive:
            life.tell("goes on")
            life.process.thaw()
            world.router.watch(life.worker_id)

    world.until_healed(fault.seconds, thaw)
    return True


def _leave(world: World, fault: Fault) -> bool:
    life = _life(world, fault)
    if life is None or life.to_router is None or life.closing:
        return False
    life.tell("wants to leave while it holds {}", _holdings(life))
    life.process.run(lambda: life.to_router.send(messages.Leaving()) if life.to_router else None)
    return True


def _cut(world: World, fault: Fault, ways: tuple[Way, ...], how: str) -> bool:
    world.tell("{} for {:.3f} s", how, fault.seconds)
    for way in ways:
        world.network.cut(way)
    _watch(world, fault.worker)

    def heal() -> None:
        world.tell("that partition between {} and {} is over", fault.worker, fault.other)
        for way in ways:
            world.network.heal(way)
        _watch(world, fault.worker)

    world.until_healed(fault.seconds, heal)
    return True


def _watch(world: World, worker_id: str) -> None:
    """What passes between router and worker has changed, perhaps: each of them may notice."""
    world.router.watch(worker_id)
    life = world.lives.get(worker_id)
    if life is not None:
        life.watch_router()


def _partition(world: World, fault: Fault) -> bool:
    ways = ((fault.worker, fault.other), (fault.other, fault.worker))
    return _cut(world, fault, ways, f"nothing passes between {fault.worker} and {fault.other}")


def _one_way(world: World, fault: Fault) -> bool:
    """From the worker to the other, or the other way round."""
    way = (fault.worker, fault.other) if fault.extra > 1.0 or fault.other != ROUTER else (ROUTER, fault.worker)
    return _cut(world, fault, (way,), f"nothing passes from {way[0]} to {way[1]}")


def _delay(world: World, fault: Fault) -> bool:
    way = (fault.worker, fault.other)
    world.tell("everything from {} to {} takes {} s longer, for {:.3f} s", *way, fault.extra, fault.seconds)
    world.network.slow_down(way, fault.extra)
    world.until_healed(fault.seconds, lambda: world.network.slow_down(way, 0.0))
    return True


def _disorder(world: World, fault: Fault) -> bool:
    way = (fault.worker, fault.other)
    world.tell("frames from {} to {} double and overtake each other, for {:.3f} s", *way, fault.seconds)
    world.network.disturb(way, 1)
    world.until_healed(fault.seconds, lambda: world.network.disturb(way, -1))
    return True


def _corrupt(world: World, fault: Fault) -> bool:
    life = _life(world, fault)
    if life is None:
        return False
    life.spoils.append(fault.how)
    return True


def _clock_jump(world: World, fault: Fault) -> bool:
    life = _life(world, fault)
    if fault.other == ROUTER:
        world.router.clock_ahead += fault.extra
    elif life is not None:
        life.clock_ahead += fault.extra
    else:
        return False
    world.tell("the clock of {} leaps {} s ahead", ROUTER if fault.other == ROUTER else fault.worker, fault.extra)
    return True


def _engine(world: World, fault: Fault) -> bool:
    life = _life(world, fault)
    if life is None:
        return False
    life.next_step_fault = fault.kind
    return True


def _router_restart(world: World, fault: Fault) -> bool:
    world.restart_router()
    return True


_STRIKE = {
    FaultKind.KILL: _kill,
    FaultKind.FREEZE: _freeze,
    FaultKind.LEAVE: _leave,
    FaultKind.PARTITION: _partition,
    FaultKind.ONE_WAY: _one_way,
    FaultKind.DELAY: _delay,
    FaultKind.DISORDER: _disorder,
    FaultKind.CORRUPT: _corrupt,
    FaultKind.CLOCK_JUMP: _clock_jump,
    FaultKind.ENGINE_CORRUPT: _engine,
    FaultKind.ENGINE_FAILED: _engine,
    FaultKind.ROUTER_RESTART: _router_restart,
}
