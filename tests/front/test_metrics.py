"""What is counted, and that labels stay few."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from front_fakes import FakeDispatcher, ask, front_app
from prometheus_client.parser import text_string_to_metric_families

from diptych.core.errors import OverloadedError, ServingError
from diptych.core.fleet import Role, RouterStats, WorkerState, WorkerView
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


def test_trust_and_what_was_turned_away() -> None:
    text = ask(FakeDispatcher(), "/metrics", method="GET").text
    found = samples(text)

    def state(name: str, **labels: str) -> str:
        """The only state that is set."""
        [now] = (
            dict(key)["state"]
            for (metric, key), value in found.items()
            if metric == name and value and labels.items() <= dict(key).items()
        )
        return now

    assert state("diptych_worker_breaker", worker="prefill-0") == "closed"
    assert state("diptych_worker_breaker", worker="decode-0") == "half-open"
    assert state("diptych_pair_breaker", prefill="prefill-0", decode="decode-0") == "open"
    assert found["diptych_router_moved_total", ()] == 6
    assert found["diptych_router_ignored_total", ()] == 5
    late = (("reason", "late frame"), ("role", "decode"), ("worker", "decode-0"))
    assert found["diptych_worker_turned_away_total", late] == 2
    families = text_string_to_metric_families(text)
    assert all(family.documentation for family in families)


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
