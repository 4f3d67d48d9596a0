from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from diptych.fleet.placement import place


@given(workers=st.integers(1, 20), cores=st.sets(st.integers(0, 200), min_size=1, max_size=64))
def test_every_worker_has_cores_and_no_more_threads_than_cores(workers: int, cores: set[int]) -> None:
    placed = place(workers, sorted(cores))
    assert len(placed) == workers
    given_out = [core for cpu in placed for core in cpu.cores]
    assert set(given_out) <= cores
    for cpu in placed:
        assert cpu.threads == len(cpu.cores) >= 1
    if workers <= len(cores):
        assert sorted(given_out) == sorted(cores)
    else:
        assert max(map(given_out.count, cores)) - min(map(given_out.count, cores)) <= 1


def test_two_workers_on_two_cores() -> None:
    assert [(cpu.cores, cpu.threads) for cpu in place(2, [0, 1])] == [((0,), 1), ((1,), 1)]


def test_nobody_to_place() -> None:
    assert place(0, [0, 1]) == []
