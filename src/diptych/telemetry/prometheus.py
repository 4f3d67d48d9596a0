"""The numbers behind `/metrics`: what clients were served, and what workers hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from diptych.core.fleet import BreakerState, RouterStats, WorkerView
from diptych.core.timeline import Timeline

MAX_WORKERS = 256  # label values of `worker`; a fleet with more shows its first ones
MAX_LABELS = 64  # values of `tenant`, and of `reason`; what comes later is counted as "other"
OTHER = "other"
OUTCOMES = ("completed", "cancelled", "failed", "refused", "overloaded")

GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
WAIT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LONG_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class ServerMetrics:
    """Counters and histograms of one front, in a registry of its own. Seconds and tokens throughout.

    Args:
        workers: the fleet at the moment of a scrape.
        router: the router's load and counts then.
    """

    def __init__(self, workers: Callable[[], list[WorkerView]], router: Callable[[], RouterStats]) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(FleetCollector(workers))
        registry.register(RouterCollector(router, workers))
        self._requests = Counter("diptych_requests", "Requests, by how they ended", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._refused = CappedCounter(registry, "diptych_refused", "Requests that were not accepted", "reason")
        self._tenants = CappedCounter(registry, "diptych_tenant_requests", "Accepted requests, by tenant", "tenant")
        self.in_flight = Gauge("diptych_requests_in_flight", "Requests being answered", registry=registry)
        self._prompt_tokens = Counter("diptych_prompt_tokens", "Prompt tokens of requests", registry=registry)
        self._cached_tokens = Counter("diptych_cached_tokens", "Prompt tokens found in the cache", registry=registry)
        self._output_tokens = Counter("diptych_output_tokens", "Tokens sent to clients", registry=registry)
        self._ttft = _histogram(registry, "ttft", "Arrival to first token", WAIT_BUCKETS)
        self._itl = _histogram(registry, "itl", "Gap between consecutive tokens", GAP_BUCKETS)
        self._e2e = _histogram(registry, "e2e", "Arrival to last token", LONG_BUCKETS)
        self._phases = {
            "queue": _histogram(registry, "queue", "Wait before prefill", WAIT_BUCKETS),
            "prefill": _histogram(registry, "prefill", "Prefill", WAIT_BUCKETS),
            "handoff": _histogram(registry, "handoff", "First to second token", GAP_BUCKETS),
        }

    def request_ended(self, outcome: str) -> None:
        """Count a request. `outcome` is one of OUTCOMES."""
        self._requests.labels(outcome).inc()

    def refused(self, code: str) -> None:
        """Count a request that was not accepted, by the code of its error."""
        self._refused.inc(code)

    def tenant_request(self, tenant: str) -> None:
        """Count an accepted request by tenant ("" is nobody in particular)."""
        self._tenants.inc(tenant or "-")

    def tokens(self, prompt: int, cached: int, output: int) -> None:
        self._prompt_tokens.inc(prompt)
        self._cached_tokens.inc(cached)
        self._output_tokens.inc(output)

    def timeline(self, timeline: Timeline) -> None:
        """Record the latencies of one stream, as far as it came."""
        if timeline.ttft is not None:
            self._ttft.observe(timeline.ttft)
        if timeline.e2e is not None:
            self._e2e.observe(timeline.e2e)
        for gap in timeline.itl:
            self._itl.observe(gap)
        phases = timeline.server_timing()
        for name in self._phases.keys() & phases.keys():
            self._phases[name].observe(phases[name])

    def render(self) -> bytes:
        """The text exposition format, version 0.0.4."""
        return generate_latest(self._registry)


class CappedCounter:
    """A counter with one label, of which only so many values are told apart: a server lives longer than the
    names that are thrown at it."""

    def __init__(self, registry: CollectorRegistry, name: str, text: str, label: str) -> None:
        self._counter = Counter(name, text, [label], registry=registry)
        self._known: set[str] = set()

    def inc(self, value: str) -> None:
        if value not in self._known and len(self._known) >= MAX_LABELS:
            value = OTHER
        self._known.add(value)
        self._counter.labels(value).inc()


class FleetCollector(Collector):
    """Reads the fleet when it is scraped, so that no worker that has left stays behind as a label."""

    def __init__(self, workers: Callable[[], list[WorkerView]]) -> None:
        self._workers = workers

    def describe(self) -> Iterable[Metric]:
        return []  # nothing is known before there are workers

    def collect(self) -> Iterable[Metric]:
        workers = self._workers()[:MAX_WORKERS]
        values: dict[str, tuple[str, Callable[[WorkerView], float]]] = {
            "diptych_worker_running": ("Sequences that take part in steps", lambda w: w.stats.running),
            "diptych_worker_waiting": ("Sequences that wait", lambda w: w.stats.waiting),
            "diptych_worker_kv_blocks": ("Blocks of KV cache", lambda w: w.num_blocks),
            "diptych_worker_kv_blocks_used": ("Blocks of live requests", lambda w: w.stats.blocks_used),
            "diptych_worker_kv_blocks_cached": ("Blocks kept for reuse", lambda w: w.stats.blocks_cached),
            "diptych_worker_preemptions": ("Preemptions since start", lambda w: w.stats.preemptions),
            "diptych_worker_handoffs_failed": ("Failed hand-offs since start", lambda w: w.stats.handoffs_failed),
            "diptych_worker_rows_dropped": ("Rows left out of running steps", lambda w: w.stats.rows_dropped),
        }
        for name, (text, value) in values.items():
            family = GaugeMetricFamily(name, text, labels=["worker", "role"])
            for worker in workers:
                family.add_metric([worker.worker_id, worker.role], value(worker))
            yield family
        turned_away = CounterMetricFamily(
            "diptych_worker_turned_away",
            "What came over data connections and was not taken, since start",
            labels=["worker", "role", "reason"],
        )
        for worker in workers:
            for reason, count in worker.turned_away:
                turned_away.add_metric([worker.worker_id, worker.role, reason], count)
        yield turned_away


class RouterCollector(Collector):
    """Reads the router when it is scraped."""

    def __init__(self, router: Callable[[], RouterStats], workers: Callable[[], list[WorkerView]]) -> None:
        self._router = router
        self._workers = workers

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        stats = self._router()
        yield GaugeMetricFamily("diptych_router_running", "Requests that workers have", stats.running)
        yield GaugeMetricFamily("diptych_router_waiting", "Requests in the queue", stats.waiting)
        yield GaugeMetricFamily("diptych_router_waiting_tokens", "Prompt tokens in the queue", stats.waiting_tokens)
        yield CounterMetricFamily("diptych_router_retried", "Attempts after the first", stats.retried)
        yield CounterMetricFamily("diptych_router_moved", "Streams handed over by workers that leave", stats.moved)
        yield CounterMetricFamily("diptych_router_checkpoints", "Copies of streams' KV", stats.checkpoints)
        yield CounterMetricFamily(
            "diptych_router_checkpoint_tokens", "Tokens whose KV was sent for copies", stats.checkpoint_tokens
        )
        yield CounterMetricFamily("diptych_router_ignored", "Messages that came too late, or twice", stats.ignored)
        workers = {worker.worker_id: BreakerState.CLOSED for worker in self._workers()} | dict(stats.worker_breakers)
        yield _breakers(
            "diptych_worker_breaker",
            "Whether a worker gets requests (closed: it does)",
            ["worker"],
            {(worker_id,): state for worker_id, state in workers.items()},
        )
        yield _breakers(
            "diptych_pair_breaker",
            "Whether a pair gets requests, of pairs that have failed lately",
            ["prefill", "decode"],
            stats.pair_breakers,
        )


def _breakers(name: str, text: str, labels: Sequence[str], states: Mapping[Any, BreakerState]) -> GaugeMetricFamily:
    """1 for the state that a breaker is in, 0 for the others. `states` are by values of `labels`."""
    family = GaugeMetricFamily(name, text, labels=[*labels, "state"])
    for names, now in itertools.islice(states.items(), MAX_WORKERS):
        for state in BreakerState:
            family.add_metric([*names, state], state is now)
    return family


def _histogram(registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"diptych_{name}_seconds", f"{text}, in seconds", buckets=buckets, registry=registry)
