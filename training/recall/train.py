"""Trains the recall model from nothing and writes a Hugging Face checkpoint folder.

It starts on repetitions of random names and on lists of up to four codes. The repetitions stop, and the
lists grow, each time the model gets nearly all of them right.
"""

import argparse
import copy
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from data import DIGITS_PER_CODE, NAMES, WORDINGS, make_sample
from tokenizer import build_tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT_LENGTH = 2048
ROPE_THETA = 1_000_000.0
STAGES = (4, 8, 16, 32, 64, 118, 192)
ADVANCE_AT = 0.95
QUESTIONS = 16
POSITION_SCALE = 2.5
ANSWER_TOKENS = DIGITS_PER_CODE + 2  # with the name and the end token
IGNORED = -100


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama whose initial weights and rotary base suit looking things up.

    The usual initial range of 0.02 is far below 1/sqrt(hidden size) here and stalls training. The high
    rotary base leaves half of each head nearly blind to position, so names match across the whole prompt.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        prepare_weights(model)
    return model


def prepare_weights(model: LlamaForCausalLM) -> None:
    """Start the first layer's head h attending h + 1 tokens back, and keep tokens visible behind it.

    Looking a name up takes two steps, neither of use without the other: mark each token with those before
    it, then find the mark. The first one is given, so that training has only the second to find.
    """
    config = model.config
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.3)
        layer.mlp.down_proj.weight.mul_(0.3)
    embedding = model.model.embed_tokens.weight
    embedding.mul_(0.5 / config.initializer_range)
    embedding[:, 0] = 1.0  # the same for every token, so that a head can attend by position alone
    attention = model.model.layers[0].self_attn
    half = config.hidden_size // config.num_attention_heads // 2
    for pair in range(4):  # the fastest rotating pairs tell neighbours apart
        angle = ROPE_THETA ** (-pair / half)
        for group in range(config.num_key_value_heads):
            attention.k_proj.weight[2 * half * group + pair, 0] = POSITION_SCALE
        for head in range(config.num_attention_heads):
            turn = angle * (head + 1)
            attention.q_proj.weight[2 * half * head + pair, 0] = POSITION_SCALE * math.cos(turn)
            attention.q_proj.weight[2 * half * head + half + pair, 0] = -POSITION_SCALE * math.sin(turn)


def encode_samples(samples, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of same-shaped samples; only answers and their end token carry a label."""
    segments = []
    for sample in samples:
        for i, (prompt, answer) in enumerate(zip(sample.prompts, sample.answers, strict=True)):
            start = tokenizer.bos_token if i == 0 else "\n"
            segments += [start + prompt, answer + tokenizer.eos_token]
    encoded = tokenizer(segments, add_special_tokens=False)["input_ids"]
    per_sample = len(segments) // len(samples)
    ids, labels = [], []
    for first in range(0, len(segments), per_sample):
        row, row_labels = [], []
        for j, piece in enumerate(encoded[first : first + per_sample]):
            row += piece
            row_labels += piece if j % 2 else [IGNORED] * len(piece)
        ids.append(row)
        labels.append(row_labels)
    return torch.tensor(ids), torch.tensor(labels)


def draw_batch(rng: random.Random, longest: int, tokens: int, tokenizer):
    """One batch of equal lists, half of them of the longest size in play, the others shorter."""
    facts = longest if rng.random() < 0.5 else rng.randint(2, longest)
    size = max(1, tokens // (5 * facts + 14 * QUESTIONS))
    wording = rng.choice(WORDINGS) + rng.choice(["\n", ""])  # chats have the newline, bare prompts need not
    newline = rng.random() < 0.5
    samples = [make_sample(rng, facts, QUESTIONS, wording, newline) for _ in range(size)]
    return facts, *encode_samples(samples, tokenizer)


def draw_repetitions(rng: random.Random, tokens: int, tokenizer):
    """One batch of random names said three times over; every name after the first time is labelled.

    Every token here teaches the model to find what followed the same name earlier, the step that looking
    up a code needs too. The length is drawn anew each time so that position alone does not help.
    """
    names = torch.tensor(tokenizer.convert_tokens_to_ids(NAMES))
    length, copies = rng.randint(4, 24), 3
    once = names[torch.randint(len(names), (tokens // (length * copies), length))]
    ids = once.repeat(1, copies)
    labels = ids.clone()
    labels[:, :length] = IGNORED
    return ids, labels


def answer_loss(model, ids, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy over the labelled tokens, and which of them are predicted right."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    logits = model.lm_head(hidden[chosen])
    targets = targets[chosen]
    return functional.cross_entropy(logits, targets), logits.argmax(-1) == targets


def build_optimizers(model, lr: float):
    """Muon for the weight matrices, AdamW for the embedding and the norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def export(model, tokenizer, folder: Path) -> None:
    """Write the bf16 checkpoint, the tokenizer and the generation defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GenerationConfig(**special, do_sample=False).save_pretrained(folder)
    # Loaders older than transformers 5 know neither the rotary settings' place nor the class name it writes.
    amend(folder / "config.json", rope_theta=ROPE_THETA)
    amend(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "model.safetensors").chmod(0o644)


def amend(path: Path, **entries) -> None:
    """Set entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2) + "\n")


@dataclass
class Progress:
    """Running means of how well it goes, and from them what to train on next."""

    step: int = 0
    stage: int = 0
    repeating: bool = True
    loss: float = 5.0
    repeated: float = 0.0
    exact: float = 0.0

    def note_repetition(self, right: torch.Tensor) -> None:
        """Count a batch of repetitions; once they go well there are no more."""
        self.step += 1
        self.repeated += 0.1 * (right.float().mean().item() - self.repeated)
        self.repeating = self.repeated < ADVANCE_AT

    def note_answers(self, loss: float, right: torch.Tensor, at_longest: bool) -> None:
        """Count a batch of questions, and lengthen the lists once the longest are answered well."""
        self.step += 1
        self.loss += 0.05 * (loss - self.loss)
        if at_longest:
            whole = right.view(-1, ANSWER_TOKENS).all(-1).float().mean().item()
            self.exact += 0.1 * (whole - self.exact)
        if self.exact > ADVANCE_AT and self.stage + 1 < len(STAGES):
            self.stage, self.exact = self.stage + 1, 0.0

    def record(self) -> dict:
        """What the log line shows."""
        record = {"step": self.step, "facts": STAGES[self.stage], "loss": round(self.loss, 3)}
        return record | {"exact": round(self.exact, 3), "repeated": round(self.repeated, 3)}


def learning_rate(elapsed: float, step: int, args) -> float:
    """Linear warm-up over steps, then a cosine to zero over the wall-clock budget."""
    warm = min(1.0, (step + 1) / args.warmup)
    return args.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, elapsed / (60 * args.minutes))))


def train(args) -> None:
    """Train for the given minutes, exporting on the way so that every moment leaves a usable model."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = build_tokenizer(CONTEXT_LENGTH)
    model = build_model(tokenizer)
    optimizers = build_optimizers(model, args.lr)
    print(f"parameters {sum(p.numel() for p in model.parameters())}, vocabulary {len(tokenizer)}", flush=True)
    progress = Progress()
    started = reported = exported = time.monotonic()
    while (now := time.monotonic()) - started < 60 * args.minutes:
        longest = STAGES[progress.stage]
        repeating = progress.repeating and progress.step % 2 == 1
        if repeating:
            ids, labels = draw_repetitions(rng, args.tokens, tokenizer)
        else:
            facts, ids, labels = draw_batch(rng, longest, args.tokens, tokenizer)
        loss, right = answer_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(now - started, progress.step, args)
            optimizer.step()
            optimizer.zero_grad()
        if repeating:
            progress.note_repetition(right)
        else:
            progress.note_answers(loss.item(), right, at_longest=facts == longest)
        if now - reported > 10:
            reported = now
            print(json.dumps({"s": round(now - started), **progress.record()}), flush=True)
        if now - exported > 300:
            exported = now
            export(model, tokenizer, args.out)
    export(model, tokenizer, args.out)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=20.0, help="training time")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=50, help="warm-up steps")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per batch, about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_arguments())
