"""From the best rung to the last: what a stream goes on with when the worker that it was on is gone."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from world import MODEL, World

from diptych.core.events import HandoffFailed, Tick
from diptych.core.fleet import Role
from diptych.core.request import Preference, Request, SamplingParams
from diptych.engine.scripted import expected_tokens

FLEET = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
PROMPT = tuple(range(1, 41))  # 10 blocks


def split(request_id: str = "r", max_tokens: int = 30) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Request(request_id=request_id, prompt_token_ids=PROMPT, sampling=sampling, prefer=Preference.SPLIT)


def right_answer(request: Request) -> list[int]:
    return expected_tokens(request.prompt_token_ids, request.sampling.max_tokens, request.sampling, MODEL)


def run_until_tokens(world: World, count: int, request_id: str = "r") -> None:
    while len(world.tokens[request_id]) < count:
        assert world.step()


def ends_well(world: World, request: Request) -> None:
    world.run()
    assert not world.errors
    assert world.tokens[request.request_id] == right_answer(request)
    world.check_clean()


def route_of(world: World, request_id: str = "r") -> str:
    route = world.router.live[request_id].route
    assert route is not None
    return route.header()


@pytest.mark.parametrize("seed", range(10))
def test_the_same_kv_goes_to_another_decode_worker(seed: int) -> None:
    """The decode worker dies before it has accepted: the prefill worker has the prompt's KV still."""
    world = World(seed, FLEET)
    world.submit(split("other"))
    world.submit(split())
    world.cancel("other")  # so that without a reason r would not go where it is
    run_until_tokens(world, 1)
    prefill, decode = world.router.live["r"].route.prefill, world.router.live["r"].route.decode
    assert prefill == "p1"
    world.kill(decode, back=False)
    assert route_of(world) == f"prefill={prefill};decode={'d1' if decode == 'd0' else 'd0'};transport=shm"
    world.run()
    assert world.cached["r~2"] == len(PROMPT)  # of 41 tokens: only the first output is computed
    ends_well(world, split())


@pytest.mark.fault(43)
def test_a_failed_handoff_goes_round_the_pair_and_not_round_its_workers() -> None:
    world = World(0, FLEET)
    world.submit(split())
    run_until_tokens(world, 1)
    route = world.router.live["r"].route
    world.workers[route.decode].handle(HandoffFailed("r", "kv_corrupt", "a page is not what it was"))
    while world.router.live["r"].attempt == 1:
        assert world.step()
    assert world.router.health.pairs.blocked() == {(route.prefill, route.decode)}
    assert world.router.health.workers.blocked() == frozenset()
    again = world.router.live["r"].route
    assert (again.prefill == route.prefill, again.decode == route.decode) == (True, False)
    world.run()
    assert world.cached["r~2"] == len(PROMPT)
    ends_well(world, split())
    assert world.router.health.pairs.blocked() == frozenset()  # a canary went over the pair


def test_with_both_gone_another_pair_starts_over_from_the_log() -> None:
    world = World(0, FLEET)
    world.submit(split())
    run_until_tokens(world, 12)
    route = world.router.live["r"].route
    world.kill(route.prefill, back=False)
    world.kill(route.decode, back=False)
    survivors = sorted(set(FLEET) - {route.prefill, route.decode})
    assert route_of(world) == f"prefill={survivors[1]};decode={survivors[0]};transport=shm"
    ends_well(world, split())


@pytest.mark.fault(33)
@pytest.mark.parametrize("dead", [("p0", "p1"), ("d0", "d1"), ("p0", "p1", "d0"), ("p0", "d0", "d1")])
@pytest.mark.parametrize("tokens", [0, 1, 12])
def test_whoever_is_left_does_both(dead: tuple[str, ...], tokens: int) -> None:
    world = World(1, FLEET)
    world.submit(split())
    run_until_tokens(world, tokens)
    for name in dead:
        world.kill(name, back=False)
    late = split("late")
    world.submit(late)
    world.run()
    assert world.tokens["late"] == right_answer(late)
    ends_well(world, split())


@pytest.mark.fault(33)
@pytest.mark.parametrize("tokens", [0, 1, 12])
def test_with_nobody_left_it_waits_and_goes_on(tokens: int) -> None:
    world = World(0, FLEET)
    world.submit(split())
    run_until_tokens(world, tokens)
    for name in FLEET:
        world.kill(name, back=False)
    world.submit(split("late"))
    assert world.errors["late"].status == 503
    world.now += 30.0
    world.revive("p1")
    del world.errors["late"]
    ends_well(world, split())


@pytest.mark.parametrize("seed", range(10))
def test_a_worker_that_leaves_hands_its_stream_over_with_its_kv(seed: int) -> None:
    world = World(seed, FLEET)
    world.submit(split())
    run_until_tokens(world, 12)
    leaver = world.router.live["r"].route.decode
    world.leave(leaver)
    assert route_of(world).startswith(f"prefill={leaver};decode=")
    world.run()
    assert world.dead == {leaver}
    assert world.cached["r~2"] >= (len(PROMPT) + 12) // 4 * 4 - 4  # its blocks, but perhaps the last
    assert world.router.health.workers.state(leaver, world.now) == "closed"  # to leave is no failure
    ends_well(world, split())


@pytest.mark.parametrize("seed", range(10))
def test_a_prefill_worker_that_leaves_is_waited_for(seed: int) -> None:
    world = World(seed, FLEET)
    world.submit(split())
    leaver = world.router.live["r"].route.prefill
    world.leave(leaver)
    run_until_tokens(world, 1)
    assert leaver not in world.dead  # nobody has read its pages yet
    world.run()
    assert world.router.retried == 0
    assert world.dead == {leaver}
    ends_well(world, split())


@pytest.mark.fault(47)
def test_what_dies_again_and_again_gets_ever_less_to_do() -> None:
    """A worker that comes back after a second and dies after another five, for ten minutes."""
    world = World(0, {"m0": Role.MIXED, "m1": Role.MIXED})
    given: list[int] = []
    for second in range(600):
        world.now = max(world.now, float(second))
        world.route(Tick())
        if second % 6 == 5:
            world.kill("m1", back=False)
        elif "m1" in world.dead:
            world.revive("m1")
        pair = [split(f"{second} {number}", max_tokens=4) for number in range(2)]
        for request in pair:
            world.submit(request)
        if any("m1" in world.routes[request.request_id] for request in pair):
            given.append(second)
        while world.under_way():
            world.step()
    assert not world.errors
    assert len([second for second in given if second < 12]) >= 7  # one death is nothing
    assert not [second for second in given if second >= 60]
    for second in range(600, 640):
        world.now = float(second)
        world.route(Tick())
        while world.under_way():
            world.step()
    assert world.router.health.workers.blocked() == {"m1"}  # it is still dead
    world.revive("m1")
    while world.under_way():
        world.step()
    assert [worker.worker_id for worker in world.router.serving()] == ["m0", "m1"]
    world.check_clean()


class Ladder(RuleBasedStateMachine):
    """Whatever happens to workers in whatever order: each accepted request ends once, with the right tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(0, FLEET, num_blocks=40)
        self.requests: list[Request] = []
        self.kills = self.submitted = 0

    @rule(
        prompt=st.lists(st.integers(1, 3), min_size=1, max_size=30),
        max_tokens=st.integers(1, 20),
        prefer=st.sampled_from(Preference),
        seed=st.integers(0, 3),
    )
    def submit(self, prompt: list[int], max_tokens: int, prefer: Preference, seed: int) -> None:
        sampling = SamplingParams(temperature=seed % 2, seed=seed, max_tokens=max_tokens)
        self.submitted += 1
        request = Request(
            request_id=f"r{self.submitted}", prompt_token_ids=tuple(prompt), sampling=sampling, prefer=prefer
        )
        self.requests.append(request)
        self.world.submit(request)

    @precondition(lambda self: len(self.world.dead) < len(FLEET))
    @rule(count=st.integers(1, 60), seed=st.integers(0, 1000))
    def step(self, count: int, seed: int) -> None:
        self.world.random.seed(seed)
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: len(self.world.dead) < len(FLEET))
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        self.world.kill(data.draw(st.sampled_from(sorted(set(FLEET) - self.world.dead))), back=False)
        self.kills += 1

    @precondition(lambda self: len(self.world.dead | self.world.leaving) < len(FLEET))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.world.leave(data.draw(st.sampled_from(sorted(set(FLEET) - self.world.dead - self.world.leaving))))

    @precondition(lambda self: self.world.dead)
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        self.world.revive(data.draw(st.sampled_from(sorted(self.world.dead))))

    @precondition(lambda self: self.world.router.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(sorted(self.world.router.live)))
        self.requests = [request for request in self.requests if request.request_id != victim]
        self.world.cancel(victim)

    @invariant()
    def what_has_come_is_right(self) -> None:
        for request in self.requests:
            tokens = self.world.tokens[request.request_id]
            assert tokens == right_answer(request)[: len(tokens)]

    def teardown(self) -> None:
        for name in sorted(self.world.dead):
            self.world.revive(name)
        self.world.run()
        for name in sorted(self.world.dead):
            self.world.revive(name)
        self.world.run()
        for request in self.requests:
            error = self.world.errors.get(request.request_id)
            if error is None:
                assert self.world.tokens[request.request_id] == right_answer(request)
                continue
            tokens = self.world.tokens[request.request_id]
            assert (error.code, tokens) == ("no_worker", []) or (error.code == "poison_request" and self.kills >= 3)
        self.world.check_clean()


TestLadder = Ladder.TestCase
TestLadder.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
