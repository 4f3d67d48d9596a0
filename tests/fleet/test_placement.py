from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from diptych.fleet.placement import place


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    cores=st.sets(st.integers(0, 200), min_size=1, max_size=64),
)
def test_every_rank_has_cores_and_no_more_threads_than_cores(ranks: list[int], cores: set[int]) -> None:
    placed = place(ranks, sorted(cores))
    assert len(placed) == len(ranks)
    given_out = [core for cpu in placed for core in cpu.cores]
    assert set(given_out) <= cores
    for count, cpu in zip(ranks, placed, strict=True):
        assert cpu.threads >= 1
        assert len(cpu.cores) == len(set(cpu.cores))
        if sum(ranks) <= len(cores):
            assert cpu.threads * count <= len(cpu.cores) < (cpu.threads + 1) * count
        else:
            assert cpu.threads == 1
            assert len(cpu.cores) == min(count, len(cores))
    if sum(ranks) <= len(cores):
        assert sorted(given_out) == sorted(cores)
    else:
        assert set(given_out) == cores


@given(workers=st.integers(1, 20), num_cores=st.integers(1, 20))
def test_workers_of_one_rank_share_cores_evenly(workers: int, num_cores: int) -> None:
    placed = place([1] * workers, range(num_cores))
    given_out = [core for cpu in placed for core in cpu.cores]
    times = [given_out.count(core) for core in range(num_cores)]
    assert max(times) - min(times) <= 1
    assert all(cpu.threads == len(cpu.cores) for cpu in placed)


def test_two_workers_on_two_cores() -> None:
    assert [(cpu.cores, cpu.threads) for cpu in place([1, 1], [0, 1])] == [((0,), 1), ((1,), 1)]


def test_a_worker_of_four_ranks_beside_one_of_one_rank() -> None:
    placed = place([4, 1], range(11))
    assert [(cpu.cores, cpu.threads) for cpu in placed] == [(tuple(range(9)), 2), ((9, 10), 2)]


def test_nobody_to_place() -> None:
    assert place([], [0, 1]) == []
