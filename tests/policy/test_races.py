"""Several workers begin with one prompt; the first of them wins."""

from __future__ import annotations

import pytest
from world import World

from diptych.core.events import RequestFailed, Tick
from diptych.core.fleet import Role
from diptych.core.request import Preference, Request, SamplingParams
from diptych.policy.admission import AdmissionLimits
from diptych.policy.saturation import RoomLimits

FLEET = {"p0": Role.PREFILL, "p1": Role.PREFILL, "p2": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
PROMPT = tuple(range(1, 41))


def raced(request_id: str = "r", race: int = 2) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=20)
    return Request(
        request_id=request_id, prompt_token_ids=PROMPT, sampling=sampling, prefer=Preference.SPLIT, race=race
    )


def runners(world: World) -> dict[str, str | None]:
    """Who prefills for what."""
    return {attempt_id: live.prefiller for attempt_id, live in world.router._attempts.running.items()}


def ends_well(world: World, request: Request) -> None:
    world.check_answered(request)
    assert not runners(world)


@pytest.mark.parametrize("seed", range(30))
def test_whoever_wins_the_answer_is_right_and_the_others_end_at_once(seed: int) -> None:
    world = World(seed, FLEET)
    world.submit(raced(race=3))
    assert sorted(runners(world)) == ["r", "r~race1", "r~race2"]
    assert set(runners(world).values()) == {"p0", "p1", "p2"}
    while not world.tokens["r"]:
        assert world.step()
    assert len(runners(world)) == 1
    ends_well(world, raced())
    assert world.router.retried == 0


def test_a_rival_that_needs_the_dead_worker_too_gets_nothing() -> None:
    world = World(0, {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE})
    world.submit(raced())
    assert len(runners(world)) == 2
    world.kill("d0", back=False)
    assert "d0" not in world.router.live["r"].workers
    ends_well(world, raced())


def test_any_of_them_may_win() -> None:
    winners = set()
    for seed in range(30):
        world = World(seed, FLEET)
        world.submit(raced())
        while not world.tokens["r"]:
            assert world.step()
        winners.update(runners(world))
    assert winners == {"r", "r~race1"}


def test_rivals_are_loads_until_they_have_lost_and_no_streams_of_their_own() -> None:
    world = World(0, FLEET)
    world.submit(raced())
    loads = world.router.loads()
    assert sorted(load.prefill_tokens for load in loads.values() if load.prefill_tokens) == [len(PROMPT)] * 2
    assert world.router.stats(0.0).running == 1
    while not world.tokens["r"]:
        assert world.step()
    assert sum(load.sequences for load in world.router.loads().values()) == 1
    ends_well(world, raced())
    assert world.router.retried == 0


def test_without_enough_workers_fewer_race() -> None:
    world = World(0, {"m0": Role.MIXED})
    world.submit(raced(race=3))
    assert list(runners(world)) == ["r"]
    ends_well(world, raced())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_the_death_of_a_stream_s_worker_leaves_it_to_a_rival(seed: int, leg: str) -> None:
    world = World(seed, FLEET)
    world.submit(raced())
    for _ in range(seed // 2):
        world.step()
    live = world.router.live["r"]
    others = [rival.workers for rival in live.rivals]
    world.kill(live.route.decode if leg == "decode" else live.route.prefill, back=False)
    if others and live.route.decode in others[0] and not world.tokens["r"]:
        assert live.attempt_id == "r~race1"
        assert world.router.retried == 0
    ends_well(world, raced())


@pytest.mark.parametrize("seed", range(20))
def test_the_death_of_a_rival_s_worker_disturbs_nobody(seed: int) -> None:
    world = World(seed, FLEET)
    world.submit(raced())
    for _ in range(seed // 2):
        world.step()
    for rival in list(world.router.live["r"].rivals):
        world.kill(rival.prefiller, back=False)
    ends_well(world, raced())
    assert world.router.retried == 0


def test_a_rival_that_fails_is_out_of_the_race() -> None:
    world = World(0, FLEET)
    world.submit(raced())
    world.route(RequestFailed(runners(world)["r~race1"], "r~race1", "engine_failed", "out of memory"))
    assert list(runners(world)) == ["r"]
    assert len(world.router.health.workers) == 1  # it is remembered, as of any attempt
    own = world.router.live["r"]
    world.route(RequestFailed(own.prefiller, "r", "engine_failed", "out of memory"))
    assert own.attempt_id == "r~2"  # nobody is left to take its place
    ends_well(world, raced())


def test_a_rival_whose_worker_dies_is_out_of_the_race() -> None:
    world = World(0, FLEET)
    world.submit(raced())
    world.kill(runners(world)["r~race1"], back=False)
    live = world.router.live["r"]
    assert not live.rivals
    world.kill(live.prefiller, back=False)
    assert live.attempt_id == "r~2"
    ends_well(world, raced())


def test_of_three_the_second_takes_the_first_s_place_and_the_third_goes_on() -> None:
    world = World(0, FLEET)
    world.submit(raced(race=3))
    live = world.router.live["r"]
    second, third = live.rivals
    world.route(RequestFailed(live.prefiller, "r", "engine_failed", "out of memory"))
    assert (live.attempt_id, live.rivals) == (second.attempt_id, [third])
    assert sorted(runners(world)) == ["r~race1", "r~race2"]
    while not world.tokens["r"]:
        assert world.step()
    assert len(runners(world)) == 1
    ends_well(world, raced())
    assert world.router.retried == 0


def test_a_rival_needs_room_like_any_other() -> None:
    world = World(0, FLEET)
    world.router._limits = AdmissionLimits(room=RoomLimits(max_pending=1))
    for name in ("a", "b"):
        world.submit(raced(name, race=1))
    world.submit(raced())
    assert sorted(runners(world)) == ["a", "b", "r"]  # no prefill worker is left
    world.run()
    for name in ("a", "b"):
        world.check_answered(raced(name, race=1))
    ends_well(world, raced())


def test_a_race_has_no_deadline_of_its_own() -> None:
    world = World(0, FLEET)
    world.submit(raced())
    world.now += 30.0
    world.route(Tick())
    assert sorted(runners(world)) == ["r", "r~race1"]
    ends_well(world, raced())


@pytest.mark.parametrize("seed", range(10))
def test_a_client_that_goes_away_ends_the_race(seed: int) -> None:
    world = World(seed, FLEET)
    world.submit(raced(race=3))
    for _ in range(seed * 2):
        world.step()
    world.cancel("r")
    assert not runners(world)
    world.run()
    world.check_clean()


def test_tokens_that_overtake_a_rival_s_first_one_are_kept() -> None:
    world = World(0, FLEET)
    world.submit(raced())
    [rival] = world.router.live["r"].rivals
    held = {("p0", "router"), ("p1", "router"), ("p2", "router")}
    while not rival.early:
        key = next(key for key in world.under_way() if key not in held)
        world.queues[key].popleft()[1]()
    world.queues[(rival.prefiller, "router")].popleft()[1]()
    assert len(world.tokens["r"]) >= 2
    ends_well(world, raced())
