from __future__ import annotations

import os
from collections import Counter

from diptych.bench.processes import Footprint, footprint
from diptych.bench.soak import Measured, latency_drift, memory_slope, report, table


def test_a_slope_is_found_in_noise() -> None:
    samples = [(float(second), 100 + 36 * second / 3600 + 0.01 * (-1) ** second) for second in range(0, 600, 2)]
    fitted = memory_slope(samples)
    assert abs(fitted["mb_per_hour"] - 36) <= 3 * fitted["standard_error"] + 0.01
    assert (fitted["mb_first"], fitted["mb_last"]) == (100.0, 106.0)


def test_drift_compares_the_first_third_with_the_last() -> None:
    latencies = [(float(second), 1.0 if second < 50 else 3.0) for second in range(100)]
    assert latency_drift(latencies) == {"p99_first": 1.0, "p99_last": 3.0}


def test_what_is_reported() -> None:
    measured = Measured(ends=Counter({"exact": 90, "left": 8, "HTTP 500": 2}), kills=3)
    measured.latencies = [(float(at), 0.5) for at in range(30, 130)]
    measured.samples = {"router": [(float(at), Footprint(50.0, 20, 4)) for at in range(0, 130, 2)]}
    measured.idle = [{"router": Footprint(50.0, 20, 4)}, {"router": Footprint(50.0, 23, 5)}]
    fields = report(measured, 130.0)
    assert (fields["requests"], fields["failed"], fields["workers_killed"]) == (100, 2, 3)
    router = fields["processes"]["router"]
    assert (router["mb_per_hour"], router["leaked_descriptors"], router["leaked_threads"]) == (0.0, 3, 1)
    assert "2 failed" in table(fields)


def test_the_footprint_of_this_process() -> None:
    before = footprint(os.getpid())
    read, write = os.pipe()
    after = footprint(os.getpid())
    os.close(read)
    os.close(write)
    assert before is not None
    assert after is not None
    assert after.descriptors == before.descriptors + 2
    assert after.megabytes > 1
    assert footprint(2**22 + 1) is None
