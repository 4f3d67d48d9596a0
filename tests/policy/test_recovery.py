from __future__ import annotations

import pytest

from diptych.policy.recovery import FAILED_HANDOFFS, Fault, fault


@pytest.mark.parametrize("code", sorted(FAILED_HANDOFFS))
def test_a_failed_handoff_is_the_fault_of_the_pair_and_of_neither_leg(code: str) -> None:
    assert fault(code, split=True) is Fault.PAIR
    assert fault(code, split=False) is Fault.NOBODY


def test_what_would_fail_anywhere_is_the_request_s_own_fault() -> None:
    assert fault("engine_corrupt", split=True) is Fault.REQUEST
    assert fault("kv_exhausted", split=False) is Fault.REQUEST


def test_an_engine_that_raises_is_the_worker_s_fault_and_what_is_unknown_is_nobody_s() -> None:
    assert fault("engine_failed", split=True) is Fault.WORKER
    assert fault("duplicate_request", split=True) is Fault.NOBODY
