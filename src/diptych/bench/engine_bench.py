"""How fast one worker's engine is beside `transformers`, on the same weights, in the same process, in turns.

    python -m diptych.bench.engine_bench [--rounds 5] [--json FILE]

The checkpoint has 32 million random bfloat16 parameters (Llama: hidden 512, 8 layers, 8 heads on 4 KV
heads, MLP 1408, vocabulary 8192). Both sides use one thread. Rounds alternate, so that whatever else
the machine does hits both; the ratio is that of the medians. Prefill is one prompt, up to its first
token; decode is steps of a whole batch whose contexts have the given length when timing starts, and grow.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diptych.core.blocks import blocks_for
from diptych.core.kv_layout import PrivateMemory
from diptych.core.request import Request, SamplingParams
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.engine.torch_engine.runner import TorchEngine

VOCAB_SIZE = 8192
DECODE_STEPS = 8  # per round; contexts go on growing from round to round
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Case:
    """One thing measured: `batch` sequences of `context` tokens."""

    phase: str  # "prefill" | "decode"
    batch: int
    context: int


@dataclass(frozen=True, slots=True)
class Result:
    """Median tokens per second of either side, and all rounds."""

    case: Case
    engine: float
    transformers: float
    engine_rounds: tuple[float, ...]
    transformers_rounds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return self.engine / self.transformers


CASES = (
    Case("prefill", 1, 128),
    Case("prefill", 1, 1024),
    Case("decode", 1, 1024),
    Case("decode", 4, 1024),
    Case("decode", 16, 1024),
)


def make_benchmark_checkpoint(directory: Path, **changes: int) -> Path:
    """Write the checkpoint (random weights, fixed seed), with `changes` to its shape; returns `directory`."""
    import transformers

    shape = {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 4096,
    }
    config = transformers.LlamaConfig(**(shape | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(directory)
    return directory


class EngineSide:
    """Our engine, driven as a worker's loop drives it."""

    def __init__(self, checkpoint: Path, max_tokens: int) -> None:
        self._engine = TorchEngine.load(checkpoint)
        self._block_size = self._engine.layout.block_size
        self._engine.allocate_kv(blocks_for(max_tokens, self._block_size), PrivateMemory)
        self._sequences: list[Sequence] = []

    def prefill(self, prompts: list[list[int]], room: int = 1) -> float:
        """Seconds from prompts to their first tokens, one prompt a step; leaves room for more tokens."""
        self._sequences = []
        next_block = 0
        for number, prompt in enumerate(prompts):
            sequence = Sequence.from_log(
                Request(request_id=str(number), prompt_token_ids=tuple(prompt), sampling=GREEDY)
            )
            needed = blocks_for(len(prompt) + room, self._block_size)
            sequence.block_table = list(range(next_block, next_block + needed))
            next_block += needed
            self._sequences.append(sequence)
        start = time.perf_counter()
        for sequence in self._sequences:
            self._step([sequence])
        return time.perf_counter() - start

    def decode(self, steps: int) -> float:
        """Seconds for that many tokens more of each sequence."""
        start = time.perf_counter()
        for _ in range(steps):
            self._step(self._sequences)
        return time.perf_counter() - start

    def _step(self, sequences: list[Sequence]) -> None:
        rows = tuple(ScheduledSequence(s, s.num_computed_tokens, s.num_uncomputed_tokens, True) for s in sequences)
        for row, token in zip(rows, self._engine.step(Batch(rows)), strict=True):
            row.sequence.num_computed_tokens = row.end
            if token is not None:
                row.sequence.token_ids.append(token.token_id)


class TransformersSide:
    """`transformers` with SDPA attention and its dynamic cache, stepped by hand: no `generate` overhead."""

    def __init__(self, checkpoint: Path) -> None:
        import transformers

        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        self._tokens = torch.empty(0)
        self._cache: Any = None

    def prefill(self, prompts: list[list[int]], room: int = 1) -> float:
        """Seconds from prompts, of equal length and run as one batch, to their first tokens."""
        self._tokens, self._cache = torch.tensor(prompts), None
        start = time.perf_counter()
        self._step()
        return time.perf_counter() - start

    def decode(self, steps: int) -> float:
        """Seconds for that many tokens more of each sequence."""
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        return time.perf_counter() - start

    @torch.inference_mode()
    def _step(self) -> None:
        out = self._model(input_ids=self._tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._tokens, self._cache = out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values


def measure(cases: tuple[Case, ...], rounds: int, checkpoint: Path) -> list[Result]:
    """Run all cases, alternating sides; one warm-up round each is not counted."""
    steps = DECODE_STEPS * (rounds + 1) + 1
    most = max(case.batch * blocks_for(case.context + steps, 16) * 16 for case in cases)
    sides = (EngineSide(checkpoint, most), TransformersSide(checkpoint))
    results = []
    for case in cases:
        generator = random.Random(0)
        prompts = [[generator.randrange(VOCAB_SIZE) for _ in range(case.context)] for _ in range(case.batch)]
        for side in sides:
            side.prefill(prompts, room=steps)
        pairs = [tuple(_rate(side, case, prompts) for side in sides) for _ in range(rounds + 1)][1:]
        ours, theirs = zip(*pairs, strict=True)
        results.append(Result(case, statistics.median(ours), statistics.median(theirs), ours, theirs))
        print(_line(results[-1]), flush=True)
    return results


def _rate(side: EngineSide | TransformersSide, case: Case, prompts: list[list[int]]) -> float:
    if case.phase == "prefill":
        return case.batch * case.context / side.prefill(prompts)
    return case.batch * DECODE_STEPS / side.decode(DECODE_STEPS)


HEADER = f"{'phase':8} {'batch':>5} {'context':>7} {'engine tok/s':>13} {'transformers tok/s':>19} {'ratio':>6}"


def _line(result: Result) -> str:
    case = result.case
    rates = f"{result.engine:13,.0f} {result.transformers:19,.0f} {result.ratio:6.2f}"
    return f"{case.phase:8} {case.batch:5} {case.context:7,} {rates}"


def report(results: list[Result]) -> dict[str, Any]:
    """What `--json` writes."""
    import transformers

    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
        "results": [{**asdict(result), "ratio": result.ratio} for result in results],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each case")
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(HEADER)
    with tempfile.TemporaryDirectory() as directory:
        results = measure(CASES, options.rounds, make_benchmark_checkpoint(Path(directory)))
    if options.json:
        options.json.write_text(json.dumps(report(results), indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
