"""What loopback TCP makes without us: iperf3, where it is installed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess


def iperf3(seconds: float = 3) -> float | None:
    """GB/s of one stream over loopback; None if it is not installed."""
    program = shutil.which("iperf3")
    if program is None:
        return None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    listening = [program, "-s", "-1", "-p", port, "--forceflush"]
    with subprocess.Popen(listening, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        while "listening" not in server.stdout.readline():
            pass
        client = [program, "-c", "127.0.0.1", "-p", port, "-t", str(seconds), "-J"]
        report = json.loads(subprocess.run(client, check=True, capture_output=True, text=True).stdout)
    return float(report["end"]["sum_received"]["bits_per_second"]) / 8e9
