"""The checkpoint that is served in the measurements: engine_bench's, with a tokenizer.

    python -m diptych.bench.checkpoint DIRECTORY

A program of its own, so that torch and transformers are never loaded by the process that measures.
"""

from __future__ import annotations

import sys
from pathlib import Path

VOCAB_SIZE = 8192


def write_tokenizer(directory: Path) -> None:
    """A tokenizer.json in which every id stands for a word of its own, such as " w17".

    No token's text waits for the next token's, so a stream shows tokens when the engine makes them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {f"Ġw{token_id}": token_id for token_id in range(VOCAB_SIZE)}  # Ġ: a blank, in byte-level spelling
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="Ġw0"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def main() -> None:
    from diptych.bench.engine_bench import make_benchmark_checkpoint

    write_tokenizer(make_benchmark_checkpoint(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
