"""What is counted, and that labels stay few."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from front_fakes import FakeDispatcher, front_app
from prometheus_client.parser import text_string_to_metric_families

from diptych.core.errors import OverloadedError, ServingError
from diptych.core.fleet import Role, RouterStats, WorkerState, WorkerStats, WorkerView
from diptych.telemetry.prometheus import MAX_WORKERS, ServerMetrics


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_requests_are_counted_by_their_end() -> None:
    async def run() -> str:
        dispatcher = FakeDispatcher(num_cached_tokens=1)
        transport = httpx.ASGITransport(front_app(dispatcher))
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4}
            await client.post("/v1/completions", json=body)
            await client.post("/v1/completions", json=body | {"stream": True, "n": 2})
            await client.post("/v1/completions", json=body | {"max_tokens": 0})
            dispatcher.failures[2] = ServingError("lost")
            await client.post("/v1/completions", json=body | {"stream": True})
            dispatcher.refusal = OverloadedError("full", retry_after=1)
            await client.post("/v1/completions", json=body)
            return (await client.get("/metrics")).text

    found = samples(asyncio.run(run()))
    outcomes = {dict(labels)["outcome"]: n for (name, labels), n in found.items() if name == "diptych_requests_total"}
    assert outcomes == {"completed": 2, "cancelled": 0, "failed": 1, "refused": 1, "overloaded": 1}
    assert found["diptych_requests_in_flight", ()] == 0
    assert found["diptych_refused_total", (("reason", "invalid_value"),)] == 1
    assert found["diptych_refused_total", (("reason", "queue_full"),)] == 1
    assert found["diptych_tenant_requests_total", (("tenant", "-"),)] == 3
    assert found["diptych_router_waiting_tokens", ()] == 30
    assert found["diptych_router_retried_total", ()] == 4
    assert found["diptych_prompt_tokens_total", ()] == 9
    assert found["diptych_cached_tokens_total", ()] == 3
    assert found["diptych_output_tokens_total", ()] == 4 + 8 + 2
    assert found["diptych_ttft_seconds_count", ()] == 4
    assert found["diptych_itl_seconds_count", ()] == 3 * 3 + 1
    assert found["diptych_worker_kv_blocks_used", (("role", "decode"), ("worker", "decode-0"))] == 3


@pytest.mark.fault(55)
def test_workers_are_bounded_and_leave_with_the_fleet() -> None:
    fleet = [
        WorkerView(worker_id=f"worker-{i}", role=Role.MIXED, state=WorkerState.READY, epoch=1)
        for i in range(MAX_WORKERS + 50)
    ]
    metrics = ServerMetrics(lambda: fleet, RouterStats)
    name = "diptych_worker_running"
    assert sum(key[0] == name for key in samples(metrics.render().decode())) == MAX_WORKERS
    del fleet[1:]
    assert sum(key[0] == name for key in samples(metrics.render().decode())) == 1


def test_what_workers_turn_away_is_named() -> None:
    stats = WorkerStats(turned_away=(("corrupt pages", 2), ("used ticket", 1)))
    worker = WorkerView(worker_id="decode-0", role=Role.DECODE, state=WorkerState.READY, epoch=1, stats=stats)
    found = samples(ServerMetrics(lambda: [worker], RouterStats).render().decode())
    about = ("role", "decode"), ("worker", "decode-0")
    for reason, count in stats.turned_away:
        assert found["diptych_worker_turned_away", tuple(sorted((*about, ("reason", reason))))] == count
