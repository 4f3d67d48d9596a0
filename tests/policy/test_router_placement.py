"""What the router believes workers to have, and what it credits them with."""

from __future__ import annotations

from router_story import LOCAL, Router, handed_over, running_on

from diptych.core import events as on
from diptych.core.blocks import block_hashes
from diptych.core.fleet import Role, WorkerState, WorkerView
from diptych.core.request import Preference, Request
from diptych.core.timeline import Timeline
from diptych.policy.live_request import LiveRequest
from diptych.policy.placement import Avoid, Placement
from diptych.policy.prefix_index import PrefixIndex
from diptych.policy.routing import Routing, WorkerLoad

PROMPT = tuple(range(100))


def placement(*workers: WorkerView) -> Placement:
    there = Placement(Routing(), PrefixIndex(capacity=1000))
    there.workers.update((worker.worker_id, worker) for worker in workers)
    return there


def worker(name: str, role: Role, block_size: int = 16) -> WorkerView:
    return WorkerView(
        worker_id=name,
        role=role,
        state=WorkerState.READY,
        epoch=1,
        num_blocks=1 << 20,
        block_size=block_size,
        transports=("shm",),
    )


def stream(prefer: Preference = Preference.SPLIT) -> LiveRequest:
    return LiveRequest(Request(request_id="r", prompt_token_ids=PROMPT, prefer=prefer), Timeline(arrived=0.0), 0.0)


def to_prefill(there: Placement, live: LiveRequest) -> int:
    place = there.place(live, {}, Avoid())
    assert place is not None
    return place.prefill_tokens


def test_what_the_prefilling_worker_has_cached_is_not_computed_again() -> None:
    there = placement(worker("p", Role.PREFILL), worker("d", Role.DECODE))
    assert to_prefill(there, stream()) == 100
    there.index.store("d", block_hashes(PROMPT, 16)[:5])
    assert to_prefill(there, stream()) == 100  # it prefills elsewhere
    assert to_prefill(there, stream(LOCAL)) == 20
    there.index.store("p", block_hashes(PROMPT, 16)[:3])
    assert to_prefill(there, stream()) == 52


def test_blocks_count_in_the_size_of_who_holds_them() -> None:
    there = placement(worker("p", Role.PREFILL, 32), worker("d", Role.DECODE, 16))
    there.index.store("p", block_hashes(PROMPT, 32)[:2])
    there.index.store("d", block_hashes(PROMPT, 16)[:6])
    assert to_prefill(there, stream()) == 36
    assert to_prefill(there, stream(LOCAL)) == 4


def test_kv_that_nobody_has_reported_counts_in_whole_blocks() -> None:
    there = placement(worker("p", Role.PREFILL, 32), worker("d", Role.DECODE, 16))
    live = stream()
    live.kv_at["p"] = 70
    assert to_prefill(there, live) == 36
    there.index.store("p", block_hashes(PROMPT, 32)[:3])
    assert to_prefill(there, live) == 4  # the better of the two


def test_a_request_is_the_load_of_who_has_to_work_for_it() -> None:
    router = Router("p0", "d0", "m0")
    router.submit()
    assert router.route().startswith("prefill=p0;decode=")
    decode = router.policy.live["r"].route.decode  # type: ignore[union-attr]
    assert router.policy.loads() == {"p0": WorkerLoad(40, 0), decode: WorkerLoad(0, 1)}
    alone = Router("m0")
    alone.submit(prefer=LOCAL)
    assert alone.policy.loads() == {"m0": WorkerLoad(40, 1)}
    alone.first("m0")
    assert alone.policy.loads() == {"m0": WorkerLoad(0, 1)}


def test_what_failed_on_one_worker_is_tried_on_another_first() -> None:
    router = Router("m0", "m1")
    router.submit(prefer=LOCAL)
    for attempt in ("r", "r~2"):
        failed_on = running_on(router)
        router.handle(on.RequestFailed(failed_on, attempt, "bad_luck", "again"))
        router.at(router.now + 1.0)
        assert running_on(router) not in ("", failed_on)


def test_who_leaves_need_not_compute_again_what_it_hands_over() -> None:
    router = handed_over()
    router.up("d0", WorkerState.DRAINING)
    assert router.route() == "prefill=d0;decode=d1;transport=shm"
    assert router.policy.loads()["d0"].prefill_tokens <= 16
