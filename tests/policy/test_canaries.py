"""Whoever failed proves itself with a canary before it gets clients' requests."""

from __future__ import annotations

import pytest
from router_story import LOCAL, Router

from diptych.core import actions as do
from diptych.core import events as on
from diptych.core.request import FinishReason, SampledToken, TokenOutput


def test_a_worker_that_comes_back_proves_itself_first() -> None:
    router = Router("m0", "m1")
    router.handle(on.WorkerGone("m1"))
    router.now = 0.1
    router.up("m1")
    assert not router.canaries()  # not yet
    assert [worker.worker_id for worker in router.policy.serving()] == ["m0"]
    assert router.policy.wake_at(0.1) == 0.5
    router.at(0.5)
    [probe] = router.canaries()
    assert (probe.worker_id, probe.request.sampling.max_tokens) == ("m1", 1)
    assert (router.policy.live, router.policy.loads(), router.policy.is_needed("m1")) == ({}, {}, False)
    token = TokenOutput(probe.request.request_id, 0, SampledToken(1), FinishReason.LENGTH)
    assert router.handle(on.FirstTokenMade("m1", token, 0, 0.0, 0.0)) == []  # nobody receives it
    assert [worker.worker_id for worker in router.policy.serving()] == ["m0", "m1"]


@pytest.mark.parametrize("how", ["failed", "late"])
def test_a_probe_that_fails_is_repeated_later(how: str) -> None:
    router = Router("m0")
    router.handle(on.WorkerGone("m0"))
    router.up("m0")
    router.at(0.5)
    [probe] = router.canaries()
    if how == "failed":
        router.handle(on.RequestFailed("m0", probe.request.request_id, "engine_failed", "no"))
    else:
        assert do.AbortOn("m0", probe.request.request_id) in router.at(5.6)
    failed_at = router.now
    assert router.policy.wake_at(failed_at) == failed_at + 1.0
    router.at(failed_at + 1.0)
    assert len(router.canaries()) == 2


def test_a_pair_is_probed_with_a_token_that_needs_the_hand_off() -> None:
    router = Router("p0", "d0")
    router.submit()
    router.handle(on.RequestFailed("d0", "r", "kv_corrupt", "a page is wrong"))
    assert router.route() == "local=d0"
    router.at(0.5)
    [probe] = router.canaries()
    name = probe.request.request_id
    assert (probe.worker_id, probe.request.sampling.max_tokens) == ("d0", 2)
    assert isinstance(router.handle(on.TicketGranted("d0", name, b"t", 0))[0], do.StartPrefill)
    router.first("p0", name)
    assert router.policy.health.pairs.blocked() == {("p0", "d0")}
    router.token("d0", 1, name, last=True)
    assert router.policy.health.pairs.blocked() == frozenset()


def test_accepted_requests_wait_for_a_worker_on_probation() -> None:
    router = Router("m0")
    router.handle(on.WorkerGone("m0"))
    router.up("m0")
    router.submit(prefer=LOCAL)  # somebody is ready, so it is accepted
    assert not router.policy.live["r"].workers
    router.at(0.5)
    [probe] = router.canaries()
    token = TokenOutput(probe.request.request_id, 0, SampledToken(1), FinishReason.LENGTH)
    said = router.handle(on.FirstTokenMade("m0", token, 0, 0.0, 0.0))
    assert [type(action) for action in said] == [do.StartLocal]


def test_every_canary_has_a_name_of_its_own() -> None:
    router = Router("m0", "m1", "m2")
    for name in ("m1", "m2"):
        router.handle(on.WorkerGone(name))
        router.up(name)
    router.at(0.5)
    probes = router.canaries()
    assert {probe.worker_id for probe in probes} == {"m1", "m2"}
    for probe in probes:
        token = TokenOutput(probe.request.request_id, 0, SampledToken(1), FinishReason.LENGTH)
        router.handle(on.FirstTokenMade(probe.worker_id, token, 0, 0.0, 0.0))
    assert len(router.policy.serving()) == 3
