"""Drives an engine step by step, with block tables scattered over a poisoned KV cache."""

from __future__ import annotations

import atexit
import random
import shutil
import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from checkpoints import make_checkpoint
from diptych.core.blocks import blocks_for
from diptych.core.kv_layout import PrivateMemory
from diptych.core.ports import Engine
from diptych.core.request import Request, SampledToken, SamplingParams
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.engine.torch_engine.runner import TorchEngine

torch.set_num_threads(1)  # on matrices this small, threads only wait for each other

GREEDY = SamplingParams(temperature=0.0)
NUM_BLOCKS = 256


@cache
def checkpoint(family: str, **overrides: Any) -> Path:
    """A checkpoint in a directory of this test process."""
    return make_checkpoint(family, Path(_directory()), **overrides)


@cache
def _directory() -> str:
    directory = mkdtemp(prefix="diptych-test-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _path(model: str | Path) -> Path:
    """A checkpoint, or that of a family."""
    return model if isinstance(model, Path) else checkpoint(model)


@cache
def reference(model: str | Path) -> Any:
    """The same checkpoint in `transformers`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(_path(model)).eval()


def expected_tokens(model: str | Path, prompt: list[int], num_tokens: int) -> list[int]:
    """What greedy `generate` of `transformers` answers."""
    inputs = torch.tensor([prompt])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = reference(model).generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )
    return list(output[0, len(prompt) :].tolist())


def random_prompt(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(1000 * seed + length)
    return [generator.randrange(4, 509) for _ in range(length)]


def full_of_nan(nbytes: int) -> PrivateMemory:
    memory = PrivateMemory(nbytes)
    memory.buffer[:] = b"\xff" * nbytes
    return memory


class EngineHarness:
    """An engine over `NUM_BLOCKS` blocks for each data-parallel rank, handed out in random order. Sequences are
    dealt out to data-parallel ranks in turn."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._free = [list(range(NUM_BLOCKS)) for _ in range(engine.layout.data_parallel)]
        self._num_sequences = 0
        for rank, blocks in enumerate(self._free):
            random.Random(7 + rank).shuffle(blocks)

    def sequence(self, prompt: list[int], sampling: SamplingParams = GREEDY, request_id: str = "") -> Sequence:
        data_rank = self._num_sequences % len(self._free)
        self._num_sequences += 1
        request_id = request_id or f"{len(prompt)}-{self._num_sequences}"
        request = Request(request_id=request_id, prompt_token_ids=tuple(prompt), sampling=sampling)
        sequence = Sequence.from_log(request)
        sequence.data_rank = data_rank
        return sequence

    def step(self, *shares: tuple[Sequence, int], on_layer: Any = None) -> list[SampledToken | None]:
        """Compute up to that many tokens of each sequence, and append what they sample."""
        rows = []
        for sequence, limit in shares:
            num_tokens = min(limit, sequence.num_uncomputed_tokens)
            start = sequence.num_computed_tokens
            self.make_room(sequence, start + num_tokens)
            rows.append(ScheduledSequence(sequence, start, num_tokens, start + num_tokens == sequence.num_tokens))
        results = self.engine.step(Batch(tuple(rows)), on_layer)
        for row, token in zip(rows, results, strict=True):
            row.sequence.num_computed_tokens = row.end
            if token is not None:
                row.sequence.token_ids.append(token.token_id)
        return results

    def generate(self, sequences: list[Sequence], num_tokens: int, chunk: int = 4096) -> list[list[int]]:
        """Step all sequences together until each has `num_tokens` outputs; blocks are given back."""
        while running := [each for each in sequences if each.num_output_tokens < num_tokens]:
            self.step(*((sequence, chunk) for sequence in running))
        for sequence in sequences:
            self.give_back(sequence)
        return [sequence.output_token_ids for sequence in sequences]

    def preempt(self, sequence: Sequence) -> None:
        """Take all its blocks away, as a scheduler does: it has to be computed again."""
        self.give_back(sequence)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    def give_back(self, sequence: Sequence) -> None:
        """Its blocks are free for others."""
        self._free[sequence.data_rank] += sequence.block_table

    def make_room(self, sequence: Sequence, num_tokens: int) -> None:
        """Have its block table hold that many tokens."""
        needed = blocks_for(num_tokens, self.engine.layout.block_size)
        while len(sequence.block_table) < needed:
            sequence.block_table.append(self._free[sequence.data_rank].pop(0))


class Harness(EngineHarness):
    """A TorchEngine; its blocks are full of NaN until written."""

    def __init__(self, model: str | Path, **load: Any) -> None:
        engine = TorchEngine.load(_path(model), **load)
        super().__init__(engine)
        [self.memory] = engine.allocate_kv(NUM_BLOCKS, full_of_nan)
