"""The examples run as they are, and say what they should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_handoff() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "handoff.py"], capture_output=True, text=True, check=False, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "100 tokens in blocks (0, 1, 2, 3); last layer by head: [30. 31.]",
        "decode goes on from token 42: as good as new",
    ]
