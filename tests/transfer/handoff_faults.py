"""Injected faults, many of them: none may be served, each has to be counted, and every block has to come back.

    python tests/transfer/handoff_faults.py --count 10000 --seed 1

One injection is one hand-off with one thing wrong, between real senders and receivers in this process. What is
wrong, and where, follows from the seed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from fault_kinds import KINDS, TRANSPORTS, Kind
from fault_rig import Rig, Unharmed
from transfer_harness import world

from diptych.core.kv_layout import KVLayout
from diptych.transfer import pieces

MODEL = KVLayout(num_layers=2, num_kv_heads=4, head_dim=2, dtype="float32", block_size=4)
PAIRS = {
    "equal": (MODEL, MODEL),
    "TP 4 -> TP 1": (replace(MODEL, tensor_parallel=4), MODEL),
    "TP 1 -> TP 8, block 4 -> 8": (MODEL, replace(MODEL, tensor_parallel=8, block_size=8)),
    "PP 2, block 8 -> DP 2, TP 2": (
        replace(MODEL, pipeline_parallel=2, block_size=8),
        replace(MODEL, data_parallel=2, tensor_parallel=2),
    ),
}
PIECE_BYTES = 512  # two units: a layer takes several frames, of two pieces each


@dataclass(slots=True)
class Tally:
    injected: int = 0
    unharmed: int = 0  # the dice made no difference, and so it was served, rightly
    counted: int = 0


def run(count: int, seed: int, directory: Path) -> dict[str, Tally]:
    """`count` injections, spread evenly over kinds, layouts and transports. Raises AssertionError as soon as
    one of them is served, is not counted, touches other blocks or leaves blocks behind."""
    tallies = {name: Tally() for name in KINDS}
    dice = random.Random(seed)
    places = [(pair, transport) for pair in PAIRS for transport in TRANSPORTS]
    share = -(-count // len(places))
    left = count
    for number, (pair, transport) in enumerate(places):
        here = directory / str(number)
        here.mkdir()
        with rig_of(PAIRS[pair], transport, here, dice) as rig:
            names = [name for name, kind in KINDS.items() if transport in kind.transports]
            for index in range(min(share, left)):
                name = names[(index + number) % len(names)]
                inject_one(rig, KINDS[name], tallies[name])
        left -= min(share, left)
    return tallies


@contextlib.contextmanager
def rig_of(layouts: tuple[KVLayout, KVLayout], transport: str, directory: Path, dice: random.Random) -> Iterator[Rig]:
    small = mock.patch.multiple(pieces, PIECE_BYTES=PIECE_BYTES, FRAME_BYTES=2 * PIECE_BYTES)
    with small, world(transport, directory, dice.getrandbits(16), *layouts) as made:
        rig = Rig(made, dice)
        try:
            yield rig
        finally:
            rig.raw.hang_up()


def inject_one(rig: Rig, kind: Kind, tally: Tally) -> None:
    while True:
        before = rig.counts[kind.counted]
        try:
            kind.inject(rig)
        except Unharmed:
            tally.unharmed += 1
            continue
        break
    assert rig.pool.num_used == 0, "blocks were left behind"
    assert rig.made.at_target.empty, "something more was reported"
    deadline = time.monotonic() + 20
    while rig.counts[kind.counted] == before:  # the thread of a refused connection may not have come to it yet
        assert time.monotonic() < deadline, f"it was not counted as {kind.counted}"
        time.sleep(0.001)
    tally.injected += 1
    tally.counted += rig.counts[kind.counted] - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.disable()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        tallies = run(options.count, options.seed, Path(directory))
    print("| fault | injected | counted as | times |\n| --- | ---: | --- | ---: |")
    for name, tally in tallies.items():
        print(f"| {name} | {tally.injected} | {KINDS[name].counted} | {tally.counted} |")
    total = sum(tally.injected for tally in tallies.values())
    seconds = time.monotonic() - start
    print(f"\n{total} faults (seed {options.seed}) in {seconds:.0f} s:", end=" ")
    print("none was served, each was counted, every block came back")


if __name__ == "__main__":
    main()
