"""Measures how often a checkpoint answers held-out lists exactly, by prompt length in tokens.

Each prompt goes through the chat template and greedy decoding up to the end token. It counts only if the
whole answer is right and the model then stops. The seed differs from the training seed, and with 1000
codes for each name no list of even a few names is likely to have come up in training.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from data import NAMES, WORDINGS, make_sample
from transformers import AutoModelForCausalLM, AutoTokenizer

BUCKETS = ((20, 50), (50, 100), (100, 200), (200, 400), (400, 600), (600, 960))
TOKENS_PER_FACT = 5
TOKENS_AROUND = (6, 17)  # the list and its question, by wording
MAX_NEW_TOKENS = 8


def held_out_messages(rng: random.Random, facts: int) -> tuple[list[dict], str]:
    """One chat with a single question, in a random wording and layout, and its answer."""
    newline = rng.random() < 0.5
    sample = make_sample(rng, facts, 1, rng.choice(WORDINGS), newline)
    text = sample.prompts[0]
    if not newline:
        return [{"role": "user", "content": text}], sample.answers[0]
    listing, question = text.split("\n")
    messages = [{"role": "system", "content": listing}, {"role": "user", "content": question}]
    return messages, sample.answers[0]


def answer(model, tokenizer, messages: list[dict]) -> tuple[str, int]:
    """The greedy answer, with its end token where it has one, and the prompt's length in tokens."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    with torch.inference_mode():
        out = model.generate(
            prompt, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return tokenizer.decode(out[0, len(ids) :]), len(ids)


def evaluate(folder: Path, dtype: str, prompts: int, seed: int) -> None:
    """Print one JSON line per bucket of prompt lengths."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    rng = random.Random(seed)
    for low, high in BUCKETS:
        fewest = -(-(low - TOKENS_AROUND[0]) // TOKENS_PER_FACT)
        most = min(len(NAMES), (high - TOKENS_AROUND[1]) // TOKENS_PER_FACT)
        right, lengths = 0, []
        for _ in range(prompts):
            messages, expected = held_out_messages(rng, rng.randint(fewest, most))
            given, length = answer(model, tokenizer, messages)
            right += given == expected + tokenizer.eos_token
            lengths.append(length)
        record = {"dtype": dtype, "tokens": f"{min(lengths)}-{max(lengths)}", "prompts": prompts}
        print(json.dumps(record | {"exact": right / prompts}), flush=True)


def main() -> None:
    """Evaluate the checkpoint named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=200, help="prompts per bucket")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=20_000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    evaluate(args.folder, args.dtype, args.prompts, args.seed)


if __name__ == "__main__":
    main()
