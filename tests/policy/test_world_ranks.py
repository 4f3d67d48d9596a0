"""Fleets whose workers are cut into ranks, each worker in its own way, over every order of messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_world import make_request, right_answer
from world import MODEL, World

from diptych.core.fleet import Role
from diptych.core.request import Preference, Request
from diptych.core.settings import ParallelSettings
from diptych.engine.scripted import ScriptedModel

FLEET = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}


def cut(block_size: int = 4, **parallel: int) -> ScriptedModel:
    return replace(MODEL, block_size=block_size, parallel=ParallelSettings(**parallel))


TP4, TP2, PP2 = cut(tensor=4), cut(tensor=2), cut(pipeline=2)
DP4, DP2_TP2 = cut(data=4, expert=4), cut(data=2, tensor=2, expert=4)
FLEETS = {
    "tp4 to dp4": {"p0": TP4, "p1": TP4, "d0": DP4, "d1": DP4},
    "dp4 to tp2": {"p0": DP4, "p1": DP4, "d0": TP2, "d1": TP2},
    "all different": {"p0": TP2, "p1": PP2, "d0": TP4, "d1": DP2_TP2},
    "small to large blocks": {"p0": cut(2, tensor=2), "p1": cut(4), "d0": cut(8, data=2), "d1": cut(6)},
    "large to small blocks": {"p0": cut(8, data=2), "p1": cut(6), "d0": cut(4), "d1": cut(2, tensor=4)},
}


def play(world: World, number: int, between: Callable[[], None]) -> list[Request]:
    """Submit requests with some messages, and `between`, in between; until nothing is under way."""
    requests = [make_request(index, world.random, world.random.choice(list(Preference))) for index in range(number)]
    for request in requests:
        world.submit(request)
        between()
        for _ in range(world.random.randrange(40)):
            world.step()
    world.run()
    world.check_clean()
    return requests


@pytest.mark.parametrize("models", FLEETS.values(), ids=FLEETS)
@pytest.mark.parametrize("num_blocks", [20, 64], ids=["tight", "roomy"])
@pytest.mark.parametrize("seed", range(4))
def test_every_answer_is_right_and_every_block_comes_back(
    models: dict[str, ScriptedModel], num_blocks: int, seed: int
) -> None:
    world = World(seed, FLEET, num_blocks=num_blocks * 4 // min(m.block_size for m in models.values()), models=models)
    requests = play(world, 25, lambda: None)
    assert not world.errors
    for request in requests:
        assert world.tokens[request.request_id] == right_answer(request), world.routes[request.request_id]
    assert any(route.startswith("prefill=") for route in world.routes.values())


@pytest.mark.parametrize("models", FLEETS.values(), ids=FLEETS)
@pytest.mark.parametrize("seed", range(4))
def test_cancelled_requests_and_killed_workers_disturb_nobody(models: dict[str, ScriptedModel], seed: int) -> None:
    world = World(seed, FLEET, num_blocks=96, models=models)
    cancelled: set[str] = set()
    kills = iter(["d0", "p0"])

    def disturb() -> None:
        if world.router.live and world.random.random() < 0.3:
            victim = world.random.choice(sorted(world.router.live))
            world.cancel(victim)
            cancelled.add(victim)
        if world.random.random() < 0.15 and (worker := next(kills, None)):
            world.kill(worker)

    requests = play(world, 20, disturb)
    assert not world.errors
    for request in requests:
        right, got = right_answer(request), world.tokens[request.request_id]
        assert got == right if request.request_id not in cancelled else got == right[: len(got)]


any_cut = st.builds(
    cut,
    st.integers(1, 9),
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.integers(1, 2),
    data=st.integers(1, 3),
)


@settings(deadline=None, max_examples=40)
@given(source=any_cut, target=any_cut, seed=st.integers(0, 1 << 32))
def test_any_cut_hands_over_to_any_other(source: ScriptedModel, target: ScriptedModel, seed: int) -> None:
    world = World(seed, {"p0": Role.PREFILL, "d0": Role.DECODE}, num_blocks=80, models={"p0": source, "d0": target})
    for request in play(world, 5, lambda: None):
        assert world.tokens[request.request_id] == right_answer(request)
    assert not world.errors


def test_requests_spread_over_the_data_parallel_ranks_and_return_to_their_prefix() -> None:
    world = World(0, {"m0": Role.MIXED}, num_blocks=64, models={"m0": DP4})
    prompts = {f"r{number}": tuple(range(number + 1, number + 41)) for number in range(8)}
    for name, prompt in prompts.items():
        world.submit(Request(request_id=name, prompt_token_ids=prompt))
    world.run()
    ranks = world.workers["m0"].ranks
    assert [rank.pool.num_cached for rank in ranks] == [2 * 13] * 4
    cached = [rank.pool.num_cached for rank in ranks]
    for name, prompt in prompts.items():
        world.submit(Request(request_id=f"again {name}", prompt_token_ids=prompt))
        world.run()
    assert [rank.pool.num_cached for rank in ranks] == cached
    world.check_clean()
