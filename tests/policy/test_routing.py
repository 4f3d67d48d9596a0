from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.fleet import Role, WorkerState, WorkerStats, WorkerView
from diptych.core.request import Preference
from diptych.policy.cost_model import CostModel
from diptych.policy.routing import Demand, Routing, WorkerLoad


def worker(name: str, role: Role, *, state: WorkerState = WorkerState.READY, **stats: float) -> WorkerView:
    return WorkerView(
        worker_id=name,
        role=role,
        state=state,
        epoch=1,
        num_blocks=1000,
        token_bytes=8192,
        transports=("shm", "tcp"),
        stats=WorkerStats(**stats),  # type: ignore[arg-type]
    )


PAIR = [worker("p0", Role.PREFILL), worker("d0", Role.DECODE)]


def route(demand: Demand, workers: list[WorkerView], loads: dict[str, WorkerLoad] | None = None) -> str:
    choice = Routing().choose(demand, workers, loads or {})
    return "none" if choice is None else choice.route.header()


def test_a_long_prompt_is_split() -> None:
    assert route(Demand(1024, {}), PAIR) == "prefill=p0;decode=d0;transport=shm"


def test_a_short_prompt_is_prefilled_where_it_decodes() -> None:
    assert route(Demand(4, {}), PAIR) == "local=d0"


def test_a_prompt_that_the_decode_worker_has_cached_stays_there() -> None:
    assert route(Demand(1024, {"d0": 1008}), PAIR) == "local=d0"
    assert route(Demand(1024, {"p0": 1008}), PAIR) == "prefill=p0;decode=d0;transport=shm"


def test_a_long_queue_for_prefill_is_a_reason_not_to_split() -> None:
    assert route(Demand(256, {}), PAIR, {"p0": WorkerLoad(prefill_tokens=50_000)}) == "local=d0"


def test_running_streams_are_a_reason_to_split() -> None:
    mixed = [worker("p0", Role.PREFILL), worker("m0", Role.MIXED)]
    assert route(Demand(64, {}), mixed) == "local=m0"
    assert route(Demand(64, {}), mixed, {"m0": WorkerLoad(sequences=8)}) == "prefill=p0;decode=m0;transport=shm"


def test_work_goes_to_the_prefill_worker_with_the_shorter_queue_or_the_prefix() -> None:
    fleet = [worker("p0", Role.PREFILL), worker("p1", Role.PREFILL), worker("d0", Role.DECODE)]
    assert "prefill=p1" in route(Demand(1024, {}), fleet, {"p0": WorkerLoad(prefill_tokens=1024)})
    assert "prefill=p1" in route(Demand(1024, {"p1": 512}), fleet)


def test_streams_are_spread_over_decode_workers() -> None:
    fleet = [worker("p0", Role.PREFILL), worker("d0", Role.DECODE), worker("d1", Role.DECODE)]
    assert "decode=d1" in route(Demand(1024, {}), fleet, {"d0": WorkerLoad(sequences=3)})


def test_a_worker_without_room_is_avoided() -> None:
    fleet = [worker("d0", Role.MIXED, blocks_used=999), worker("d1", Role.MIXED)]
    assert route(Demand(1024, {}), fleet) == "local=d1"


def test_memory_is_shared_on_one_host_only() -> None:
    apart = [replace(PAIR[0], host="a"), replace(PAIR[1], host="b")]
    assert route(Demand(1024, {}), apart) == "prefill=p0;decode=d0;transport=tcp"
    memory_only = [replace(side, transports=("shm",)) for side in apart]
    assert route(Demand(1024, {}, Preference.SPLIT), memory_only) == "local=d0"


def test_wishes_overrule_the_prediction() -> None:
    assert route(Demand(4, {}, Preference.SPLIT), PAIR) == "prefill=p0;decode=d0;transport=shm"
    assert route(Demand(4096, {}, Preference.LOCAL), PAIR) == "local=d0"


def test_a_suspect_pair_is_not_used() -> None:
    fleet = [worker("p0", Role.PREFILL), worker("p1", Role.PREFILL), worker("d0", Role.DECODE)]
    choice = Routing().choose(Demand(1024, {}), fleet, {}, avoid={("p0", "d0")})
    assert choice is not None
    assert choice.route.prefill == "p1"
    choice = Routing().choose(Demand(1024, {}, Preference.SPLIT), PAIR, {}, avoid={("p0", "d0")})
    assert choice is not None
    assert choice.route.header() == "local=d0"


def test_two_mixed_workers_can_be_made_to_split() -> None:
    fleet = [worker("m0", Role.MIXED), worker("m1", Role.MIXED)]
    assert route(Demand(1024, {}, Preference.SPLIT), fleet).startswith("prefill=")
    assert route(Demand(1024, {}), fleet).startswith("local=")


def test_without_a_pair_everything_is_served_by_whoever_is_left() -> None:
    assert route(Demand(1024, {}, Preference.SPLIT), [PAIR[0]]) == "local=p0"
    assert route(Demand(1024, {}), [PAIR[1]]) == "local=d0"
    lost = worker("d0", Role.DECODE, state=WorkerState.DRAINING)
    assert route(Demand(1024, {}), [PAIR[0], lost]) == "local=p0"
    assert route(Demand(1024, {}), [lost]) == "none"


@given(
    tokens=st.integers(1, 10_000),
    cached=st.dictionaries(st.sampled_from(["p0", "d0"]), st.integers(0, 10_000)),
    queued=st.integers(0, 100_000),
    sequences=st.integers(0, 100),
)
def test_every_route_names_ready_workers_and_a_time(
    tokens: int, cached: dict[str, int], queued: int, sequences: int
) -> None:
    loads = {"p0": WorkerLoad(prefill_tokens=queued), "d0": WorkerLoad(sequences=sequences)}
    choice = Routing().choose(Demand(tokens, cached), PAIR, loads)
    assert choice is not None
    assert choice.seconds > 0
    assert choice.route.decode == "d0"
    assert choice.route.prefill in (None, "p0")


def test_measured_rates_replace_the_defaults() -> None:
    cost = CostModel(prefill_rate=1000.0, decode_step_seconds=0.01)
    assert cost.prefill_seconds(worker("p", Role.PREFILL), 500) == 0.5
    assert cost.prefill_seconds(worker("p", Role.PREFILL, prefill_rate=5000.0), 500) == 0.1
    assert cost.decode_seconds(worker("d", Role.DECODE, decode_step_seconds=0.02), 0) == 0.02
    assert cost.exposed_transfer_seconds(worker("d", Role.DECODE), 1000) == pytest.approx(0.005 + 0.125 * 8192e3 / 1e9)
