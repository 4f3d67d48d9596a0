"""A stream's KV is copied to a buddy while it runs, so that its worker's death costs only the tail."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from world import MODEL, World

from diptych.core.events import HandoffFailed, RequestFailed, Tick, WorkerUpdated
from diptych.core.fleet import Role
from diptych.core.request import Preference, Request, SamplingParams
from diptych.core.timeline import Timeline
from diptych.policy.admission import AdmissionLimits
from diptych.policy.live_request import Checkpoint, LiveRequest
from diptych.policy.saturation import RoomLimits

FLEET = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
PROMPT = tuple(range(1, 41))  # 10 blocks
EVERY = 20  # tokens
BLOCK = MODEL.block_size


def insured(request_id: str = "r", *, every: int = EVERY, prefer: Preference = Preference.AUTO) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=80)
    return Request(
        request_id=request_id, prompt_token_ids=PROMPT, sampling=sampling, prefer=prefer, checkpoint_tokens=every
    )


def copies(world: World) -> list[LiveRequest]:
    running = world.router._attempts.running.values()
    return [live for live in running if isinstance(live.shadow, Checkpoint)]


def run_until(world: World, count: int, request_id: str = "r") -> LiveRequest:
    """So many tokens have come, and no copy is under way or due."""
    live = world.router.live[request_id]
    while len(world.tokens[request_id]) < count or copies(world) or live.num_tokens >= live.backup.due > 0:
        assert world.step()
    return live


def ends_well(world: World, request: Request) -> None:
    world.check_answered(request)
    assert not copies(world)


def checkpoints_of(world: World) -> set[str]:
    return {name for name in world.cached if name.startswith("checkpoint~")}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("prefill_dies", [False, True])
def test_a_death_costs_only_what_came_after_the_last_copy(seed: int, prefill_dies: bool) -> None:
    world = World(seed, FLEET)
    world.submit(insured())
    live = run_until(world, 1)
    prefill = live.route.prefill
    live = run_until(world, 25)
    dead, buddy = live.route.decode, live.backup.buddy
    assert buddy not in (None, dead)
    if prefill_dies and prefill is not None:
        world.kill(prefill, back=False)
    num_tokens = live.num_tokens
    world.kill(dead, back=False)
    assert live.route.decode == buddy
    world.run()
    there = (
        world.cached["r~2"]
        if live.attempt == 2 and "r~2" not in world.claims
        else world.claims["r~2"].first_block * BLOCK
    )
    assert num_tokens - there <= EVERY + BLOCK
    ends_well(world, insured())


def test_without_the_wish_nothing_is_copied() -> None:
    world = World(0, FLEET)
    world.submit(insured(every=0))
    ends_well(world, insured(every=0))
    assert not checkpoints_of(world)


def test_a_copy_sends_only_what_the_buddy_lacks() -> None:
    world = World(1, FLEET)
    world.submit(insured())
    ends_well(world, insured())
    claims = [world.claims[name] for name in checkpoints_of(world)]
    claims.sort(key=lambda ticket: ticket.num_tokens)
    assert len(claims) >= 3
    assert len({ticket.worker_id for ticket in claims}) == 1
    for earlier, later in zip(claims, claims[1:], strict=False):
        assert later.first_block == earlier.num_tokens // BLOCK
    stats = world.router.stats(0.0)
    assert stats.checkpoints == len(claims)
    assert stats.checkpoint_tokens == sum(ticket.num_tokens - ticket.first_block * BLOCK for ticket in claims)


@pytest.mark.parametrize("every", [EVERY, EVERY - 3, EVERY + 3])
def test_the_source_of_a_copy_computes_one_token(every: int) -> None:
    world = World(1, FLEET)
    world.submit(insured(every=every))
    ends_well(world, insured(every=every))
    assert len(checkpoints_of(world)) >= 3
    for name in checkpoints_of(world):
        asked_at = int(name.rpartition("~")[2])  # the length of the log: the last token has no KV yet
        assert world.claims[name].num_tokens == (asked_at - 1) // BLOCK * BLOCK + 1
        assert world.cached[name] == world.claims[name].num_tokens - 1


@pytest.mark.parametrize("seed", range(20))
def test_the_end_of_a_stream_ends_its_copy(seed: int) -> None:
    world = World(seed, FLEET)
    world.submit(insured())
    while not copies(world):
        assert world.step()
    for _ in range(seed):
        world.step()
    world.cancel("r")
    assert not copies(world)
    world.run()
    world.check_clean()


@pytest.mark.parametrize("seed", range(20))
def test_the_death_of_either_end_of_a_copy_leaves_nothing_behind(seed: int) -> None:
    world = World(seed, FLEET)
    world.submit(insured())
    while not copies(world):
        assert world.step()
    [copy] = copies(world)
    for _ in range(seed // 2):
        world.step()
    world.kill(copy.pair[seed % 2])
    before = len(checkpoints_of(world))
    run_until(world, 75)
    assert len(checkpoints_of(world)) > before  # and there are others
    ends_well(world, insured())


def test_one_copy_at_a_time_in_its_tenant_s_part_of_the_cache() -> None:
    world = World(1, FLEET)
    request = replace(insured(every=1), cache_salt="salt", tenant="tenant")
    world.submit(request)
    most = 0
    while world.step():
        under_way = copies(world)
        most = max(most, len(under_way))
        assert all((copy.request.cache_salt, copy.request.tenant) == ("salt", "tenant") for copy in under_way)
    assert most == 1
    ends_well(world, request)


def test_a_stream_that_went_on_at_its_buddy_gets_a_new_one() -> None:
    world = World(2, FLEET | {"d2": Role.DECODE})
    world.submit(insured())
    live = run_until(world, 25)
    buddy = live.backup.buddy
    world.kill(live.route.decode, back=False)
    assert live.route.decode == buddy
    run_until(world, 60)
    assert live.backup.buddy not in (None, buddy)
    ends_well(world, insured())


def test_a_dead_buddy_is_replaced() -> None:
    world = World(2, FLEET | {"d2": Role.DECODE})
    world.submit(insured())
    live = run_until(world, 10)
    first = live.backup.buddy
    world.kill(first, back=False)
    before = len(checkpoints_of(world))
    run_until(world, len(world.tokens["r"]) + 1)
    assert len(checkpoints_of(world)) > before  # without waiting for so many tokens more
    assert live.backup.buddy not in (None, first, live.route.decode)
    ends_well(world, insured())


def test_a_failed_copy_costs_its_pair_trust_and_the_stream_nothing() -> None:
    world = World(3, FLEET | {"d2": Role.DECODE})
    world.submit(insured())
    while not copies(world):
        assert world.step()
    [copy] = copies(world)
    prefill, decode = copy.pair
    while copy.request.request_id not in world.workers[decode].tickets:
        assert world.step()
    world.workers[decode].handle(HandoffFailed(copy.request.request_id, "kv_corrupt", "a page is not what it was"))
    while copies(world) == [copy]:
        assert world.step()
    assert world.router.health.pairs.blocked() == {(prefill, decode)}
    assert not world.router.health.workers.blocked()
    assert run_until(world, 40).backup.buddy not in (None, decode)
    ends_well(world, insured())
    assert world.router.retried == 0


def test_a_copy_that_a_worker_fails_to_compute_costs_nobody_trust() -> None:
    world = World(3, FLEET)
    world.submit(insured())
    while not copies(world):
        assert world.step()
    [copy] = copies(world)
    for _ in range(5):
        world.route(RequestFailed(copy.pair[0], copy.attempt_id, "engine_failed", "out of memory"))
    assert copy not in copies(world)
    assert world.router.health.all_well
    ends_well(world, insured())


def test_a_copy_that_gets_no_ticket_soon_is_given_up() -> None:
    world = World(4, FLEET)
    world.now = 100.0
    world.submit(insured())
    while not copies(world):
        assert world.step()
    [copy] = copies(world)
    world.route(Tick())
    assert copies(world) == [copy]
    world.now += 2.0
    world.route(Tick())
    assert not copies(world)
    assert world.router.live["r"].backup.buddy is None
    ends_well(world, insured())


@pytest.mark.parametrize("trouble", ["buddy full", "buddy busy", "source busy", "queue", "somebody waits"])
def test_while_there_is_no_room_nothing_is_copied(trouble: str) -> None:
    world = World(5, {"p0": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE})
    world.submit(insured())
    while len(world.tokens["r"]) < 1:
        assert world.step()
    source = world.router.live["r"].route.decode
    for name, worker in world.workers.items():
        view = worker.view()
        stats = view.stats
        if name != source and trouble == "buddy full":
            stats = replace(stats, blocks_used=view.num_blocks - 20)
        elif (trouble == "buddy busy" and name != source) or (trouble == "source busy" and name == source):
            stats = replace(stats, waiting=1)
        world.route(WorkerUpdated(replace(view, stats=stats)))
    if trouble == "queue":
        world.router._limits = AdmissionLimits(room=RoomLimits(max_pending=0))
        world.submit(insured("other"))
        assert world.router.admission.queue
    if trouble == "somebody waits":
        world.router._attempts.waiting["other"] = LiveRequest(insured("other"), Timeline(0.0), 0.0, not_before=math.inf)
    run_until(world, 30)
    assert not checkpoints_of(world)


def test_copies_are_nobody_s_load_and_keep_no_worker_from_leaving() -> None:
    world = World(6, FLEET)
    world.submit(insured())
    while not copies(world):
        assert world.step()
    [copy] = copies(world)
    buddy = copy.pair[1]
    assert buddy not in world.router.loads()
    assert not world.router.is_needed(buddy)
    assert world.router.stats(0.0).running == 1
    world.leave(buddy)
    ends_well(world, insured())


def test_a_stream_that_moves_while_a_copy_is_under_way_is_copied_again() -> None:
    world = World(7, FLEET | {"d2": Role.DECODE})
    world.submit(insured())
    while not copies(world):
        assert world.step()
    live = world.router.live["r"]
    world.leave(live.route.decode)
    assert (live.attempt, copies(world)) == (2, [])
    while not copies(world):
        assert world.step()
    assert live.attempt == 2
    ends_well(world, insured())


def test_a_copy_that_fails_is_not_repeated_at_once() -> None:
    world = World(3, FLEET)
    world.submit(insured())
    while not copies(world):
        assert world.step()
    [copy] = copies(world)
    live, begun = world.router.live["r"], world.router.live["r"].num_tokens
    world.route(RequestFailed(copy.pair[0], copy.attempt_id, "engine_failed", "out of memory"))
    while not copies(world):
        assert world.step()
    assert live.num_tokens >= begun + EVERY
    ends_well(world, insured())
