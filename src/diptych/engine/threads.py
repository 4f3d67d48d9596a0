"""What a process that computes must find in its environment before torch is loaded."""

from __future__ import annotations


def thread_environment(threads: int) -> dict[str, str]:
    """So many threads inside an operation; those that wait sleep instead of spinning."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
