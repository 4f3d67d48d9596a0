from __future__ import annotations

from diptych.core.fleet import Role, WorkerState, WorkerStats, WorkerView
from diptych.policy.admission import AdmissionLimits, refusal

LIMITS = AdmissionLimits(max_requests=2)


def view(state: WorkerState, rate: float = 0.0) -> WorkerView:
    return WorkerView(worker_id="w", role=Role.MIXED, state=state, epoch=1, stats=WorkerStats(prefill_rate=rate))


def test_below_the_limit_everything_comes_in() -> None:
    assert refusal(1, 10_000, [view(WorkerState.READY)], LIMITS) is None


def test_at_the_limit_the_client_is_told_when_to_come_back() -> None:
    error = refusal(2, 10_000, [view(WorkerState.READY, rate=2000.0)], LIMITS)
    assert error is not None
    assert (error.status, error.code, error.retry_after) == (429, "queue_full", 5.0)


def test_without_a_ready_worker_nothing_comes_in() -> None:
    for workers in ([], [view(WorkerState.STARTING)], [view(WorkerState.DRAINING)]):
        error = refusal(0, 0, workers, LIMITS)
        assert error is not None
        assert (error.status, error.code) == (503, "no_worker")
        assert error.retry_after > 0
