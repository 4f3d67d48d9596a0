"""Ranks live and die together: with a rank the engine is lost, and without their leader ranks end."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch_harness import checkpoint, random_prompt
from torch_parallel_harness import ParallelHarness, Ranks, started

from diptych.core.errors import CheckpointError, EngineLost
from diptych.core.settings import EngineSettings, ParallelSettings
from diptych.engine.torch_engine.parallel_engine import ParallelEngine

LIMIT_SECONDS = 20.0

# A leader that has a step under way when it is killed: rank 1 is stopped, so rank 0 waits for it in a collective.
LEADER = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
from torch_harness import random_prompt
from torch_parallel_harness import ParallelHarness, started
from diptych.core.settings import ParallelSettings
with started(Path(sys.argv[2]), ParallelSettings(tensor=2)) as ranks:
    harness = ParallelHarness(ranks)
    sequence = harness.sequence(random_prompt(40))
    harness.step((sequence, 30))
    os.kill(ranks.engine.pids[1], signal.SIGSTOP)
    print(*ranks.engine.pids, flush=True)
    harness.step((sequence, 30))
"""


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with started("llama", ParallelSettings(tensor=2)) as ranks:
        yield ranks


def ended(pids: Sequence[int]) -> bool:
    """Wait until processes that are not our children have ended."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        events = poll.poll(LIMIT_SECONDS * 1000)
        os.close(descriptor)
        if not events:
            return False
    return True


def test_a_rank_that_dies_in_a_step_ends_the_engine(ranks: Ranks) -> None:
    harness = ParallelHarness(ranks)
    sequence = harness.sequence(random_prompt(40))
    harness.step((sequence, 30))
    victim = ranks.engine.pids[1]
    os.kill(victim, signal.SIGSTOP)  # now the others have to wait for it
    killer = threading.Timer(0.2, os.kill, (victim, signal.SIGKILL))  # whenever it comes, the outcome is the same
    killer.start()
    with pytest.raises(EngineLost, match=r"rank 1 has ended \(signal SIGKILL\)"):
        harness.step((sequence, 30))
    killer.join()
    assert ended(ranks.engine.pids)
    with pytest.raises(EngineLost, match="rank 1 has ended"):
        harness.step((sequence, 30))
    ranks.engine.forget(sequence.request_id)


def test_a_rank_that_dies_between_steps_is_noticed_at_once(ranks: Ranks) -> None:
    harness = ParallelHarness(ranks)
    sequence = harness.sequence(random_prompt(40))
    harness.step((sequence, 30))
    losses: queue.SimpleQueue[EngineLost] = queue.SimpleQueue()
    ranks.engine.watch(losses.put)
    os.kill(ranks.engine.pids[0], signal.SIGKILL)
    loss = losses.get(timeout=LIMIT_SECONDS)
    assert str(loss) == "rank 0 has ended (signal SIGKILL)"
    assert ended(ranks.engine.pids)
    ranks.engine.watch(losses.put)  # as the next life of a worker does
    assert losses.get(timeout=LIMIT_SECONDS) is loss
    with pytest.raises(EngineLost, match=r"rank 0 has ended \(signal SIGKILL\)"):
        harness.step((sequence, 30))


def test_a_rank_that_is_stuck_ends_the_engine(ranks: Ranks) -> None:
    harness = ParallelHarness(ranks)
    sequence = harness.sequence(random_prompt(40))
    harness.step((sequence, 30))
    losses: queue.SimpleQueue[EngineLost] = queue.SimpleQueue()
    ranks.engine.watch(losses.put)
    ranks.engine.silence_seconds = 0.5
    os.kill(ranks.engine.pids[1], signal.SIGSTOP)
    with pytest.raises(EngineLost, match=r"no rank has said anything for 0.5 s: one of them is stuck"):
        harness.step((sequence, 30))
    assert ended(ranks.engine.pids)
    ranks.engine.close()
    assert losses.empty(), "whoever takes the step knows already"


@pytest.mark.slow
def test_a_rank_that_fails_says_why(ranks: Ranks) -> None:
    """A block table that is too short, which a scheduler would never hand out."""
    harness = ParallelHarness(ranks)
    sequence = harness.sequence(random_prompt(40))
    harness.step((sequence, 30))
    sequence.block_table = sequence.block_table[:1]
    harness.make_room = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(EngineLost, match="rank [01]: IndexError"):
        harness.step((sequence, 30))
    assert ended(ranks.engine.pids)


@pytest.mark.slow
def test_whoever_breaks_a_step_off_ends_the_engine(ranks: Ranks) -> None:
    harness = ParallelHarness(ranks)
    sequence = harness.sequence(random_prompt(40))

    def on_layer(layer: int) -> None:
        raise ZeroDivisionError(layer)

    with pytest.raises(ZeroDivisionError):
        harness.step((sequence, 30), on_layer=on_layer)
    with pytest.raises(EngineLost):
        harness.step((sequence, 30))
    assert ended(ranks.engine.pids)


def test_without_their_leader_ranks_end_even_in_a_collective() -> None:
    here = str(Path(__file__).parent)
    arguments = (os.pathsep.join((here, str(Path(here).parent))), str(checkpoint("llama")))
    leader = subprocess.Popen((sys.executable, "-c", LEADER, *arguments), stdout=subprocess.PIPE, text=True)
    with leader:
        assert leader.stdout is not None
        running, stopped = map(int, leader.stdout.readline().split())
        try:
            leader.kill()
            leader.wait()
            assert ended([running])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stopped, signal.SIGCONT)
        assert ended([stopped])


@pytest.mark.slow
def test_a_checkpoint_that_ranks_cannot_read_is_the_operators_business(tmp_path: Path) -> None:
    for file in checkpoint("llama").iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="rank [01]: .*lacks model.safetensors"):
        ParallelEngine.load(EngineSettings(model=str(tmp_path), parallel=ParallelSettings(tensor=2)))
