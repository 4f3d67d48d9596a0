"""What a server costs while nobody asks anything: CPU time of all its processes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from diptych.bench.load import LoadClient
from diptych.bench.metrics import Fields, cpu_percent
from diptych.bench.server import RunningServer, System, diptych_server
from diptych.bench.serving import SERVED_NAME, LoadPlan, warm_up

SETTLE = 3.0  # seconds after the last answer


async def measure_idle(model: Path, system: System, seconds: float) -> Fields:
    """CPU use over `seconds` idle seconds, after a few requests have been served. Raises ServerError."""
    with diptych_server(model, system, SERVED_NAME) as server:
        async with LoadClient(server.url) as client:
            await warm_up(client, LoadPlan(request_rate=1, num_prompts=0))
        await asyncio.sleep(SETTLE)
        before, began = _cpu_seconds(server), time.monotonic()
        await asyncio.sleep(seconds)
        after, ended = _cpu_seconds(server), time.monotonic()
    used = cpu_percent(before, after, ended - began)
    return {
        "system": system.name,
        "flags": " ".join(system.flags),
        "seconds": seconds,
        "num_processes": len(after),
        "cpu_percent_of_one_core": round(used, 2),
    }


def _cpu_seconds(server: RunningServer) -> dict[int, float]:
    return {pid: stat.cpu_seconds for pid, stat in server.processes().items()}
