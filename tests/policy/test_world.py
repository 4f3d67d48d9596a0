"""Router and workers together, over every order of messages that a seed can think of."""

from __future__ import annotations

import random

import pytest
from world import MODEL, World

from diptych.core.fleet import Role
from diptych.core.request import Preference, Request, SamplingParams
from diptych.engine.scripted import expected_tokens

PAIR = {"p0": Role.PREFILL, "d0": Role.DECODE}
FLEET = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
MIXED = {"m0": Role.MIXED}


def make_request(number: int, rng: random.Random, prefer: Preference = Preference.AUTO) -> Request:
    head = [rng.choice((1, 2)) for _ in range(rng.choice((0, 8, 20)))]  # prefixes that others share
    prompt = (*head, *(rng.randrange(1, 256) for _ in range(rng.randrange(1, 40))))
    temperature = rng.choice((0.0, 1.0))  # draws depend on seed and position alone, whoever makes them
    sampling = SamplingParams(temperature=temperature, seed=rng.randrange(1 << 64), max_tokens=rng.randrange(1, 24))
    return Request(request_id=f"r{number}", prompt_token_ids=prompt, sampling=sampling, prefer=prefer)


def right_answer(request: Request) -> list[int]:
    return expected_tokens(request.prompt_token_ids, request.sampling.max_tokens, request.sampling, MODEL)


@pytest.mark.fault(48)
@pytest.mark.parametrize("roles", [PAIR, FLEET, MIXED], ids=["pair", "fleet", "mixed"])
@pytest.mark.parametrize("num_blocks", [20, 64], ids=["tight", "roomy"])
@pytest.mark.parametrize("seed", range(12))
def test_every_answer_is_right_and_every_block_comes_back(roles: dict[str, Role], num_blocks: int, seed: int) -> None:
    world = World(seed, roles, num_blocks=num_blocks)
    preferences = list(Preference)
    requests = [make_request(number, world.random, world.random.choice(preferences)) for number in range(25)]
    for request in requests:
        world.submit(request)
        for _ in range(world.random.randrange(30)):
            world.step()
    world.run()
    assert not world.errors
    for request in requests:
        assert world.tokens[request.request_id] == right_answer(request), world.routes[request.request_id]
    world.check_clean()


@pytest.mark.fault(23)
@pytest.mark.parametrize("seed", range(30))
def test_cancelled_requests_leave_nothing_behind_and_disturb_nobody(seed: int) -> None:
    world = World(seed, FLEET, num_blocks=24)
    requests = [make_request(number, world.random, Preference.SPLIT) for number in range(25)]
    cancelled: set[str] = set()
    for request in requests:
        world.submit(request)
        for _ in range(world.random.randrange(40)):
            world.step()
            if world.random.random() < 0.05 and world.router.live:
                victim = world.random.choice(sorted(world.router.live))
                world.cancel(victim)
                cancelled.add(victim)
    world.run()
    assert not world.errors
    assert cancelled
    assert world.num_dropped
    for request in requests:
        right = right_answer(request)
        got = world.tokens[request.request_id]
        assert got == right if request.request_id not in cancelled else got == right[: len(got)]
    world.check_clean()


def test_a_long_prompt_is_split_and_a_short_one_is_not() -> None:
    world = World(0, PAIR, num_blocks=64)
    long = Request(request_id="long", prompt_token_ids=tuple(range(1, 201)))
    short = Request(request_id="short", prompt_token_ids=(1, 2, 3))
    world.submit(long)
    world.submit(short)
    world.run()
    assert world.routes == {"long": "prefill=p0;decode=d0;transport=shm", "short": "local=d0"}


def test_the_client_can_overrule_the_policy() -> None:
    world = World(0, PAIR)
    world.submit(Request(request_id="a", prompt_token_ids=(1, 2, 3), prefer=Preference.SPLIT))
    world.submit(Request(request_id="b", prompt_token_ids=tuple(range(1, 201)), prefer=Preference.LOCAL))
    world.run()
    assert world.routes == {"a": "prefill=p0;decode=d0;transport=shm", "b": "local=d0"}


def test_a_request_that_can_never_fit_fails_clearly() -> None:
    world = World(0, PAIR, num_blocks=8)
    world.submit(Request(request_id="big", prompt_token_ids=tuple(range(1, 101)), prefer=Preference.SPLIT))
    world.run()
    assert world.errors["big"].code == "kv_exhausted"
    world.check_clean()


@pytest.mark.fault(30, 31, 32)
@pytest.mark.parametrize("roles", [PAIR, FLEET], ids=["pair", "fleet"])
@pytest.mark.parametrize("seed", range(25))
def test_killed_workers_cost_a_pause_and_no_token(roles: dict[str, Role], seed: int) -> None:
    """While others live (or the dead come back at once) every stream goes on, with the same tokens."""
    world = World(seed, roles, num_blocks=40)
    requests = [make_request(number, world.random, world.random.choice(list(Preference))) for number in range(20)]
    kills = 0
    for number, request in enumerate(requests):
        world.submit(request)
        if number == 0:  # at least one that certainly serves somebody
            world.kill(world.router.live[request.request_id].route.decode)
        for _ in range(world.random.randrange(40)):
            world.step()
        if world.random.random() < 0.25 and kills < 2:  # fewer in all than a request has attempts
            world.kill(world.random.choice(sorted(roles)))
            kills += 1
    world.run()
    assert world.router.retried
    assert not world.errors
    for request in requests:
        assert world.tokens[request.request_id] == right_answer(request)
    world.check_clean()
