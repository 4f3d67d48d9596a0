from __future__ import annotations

import signal

from diptych.bench.faults.kill_matrix import PHASES, Cell, grid
from diptych.bench.faults.runner import Outcome


def test_the_grid_has_a_place_for_every_cell_that_was_run() -> None:
    done = Cell(PHASES[0], "prefill", signal.SIGKILL)
    broken = Cell(PHASES[1], "router", signal.SIGTERM)
    outcomes = [Outcome(done.name, "", "", 3.0, 0.25), Outcome(broken.name, "answers: 1 cut", "", 3.0, 0.5)]
    heading, first, second = grid(outcomes).splitlines()
    assert heading.split() == [
        word
        for victim in ("prefill", "decode", "router")
        for sign in ("KILL", "STOP", "TERM")
        for word in (victim, sign)
    ]
    assert first.split() == ["idle", "ok", "0.2", "s", *"--------"]
    assert second.split() == ["admitted", *"--------", "VIOLATED"]
