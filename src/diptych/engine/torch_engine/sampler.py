"""Logits to tokens. Semantics and order are those of `core.request.SamplingParams`.

Whatever is random is a function of (seed, output index): one uniform number per token, turned into a
token by inverting the cumulative distribution in vocabulary order. So a draw depends neither on the rest
of the batch nor on the process that makes it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from diptych.core.errors import EngineCorrupt
from diptych.core.request import SampledToken, SamplingParams
from diptych.core.sequence import Sequence
from diptych.engine.torch_engine.penalties import PenaltyCounts, needs_counts

# How many candidates top-p looks at before it falls back to sorting the whole vocabulary.
TOP_P_CANDIDATES = 1024


def uniform(seed: int, index: int) -> float:
    """Draw number `index` of `seed`: uniform in [0, 1), 53 random bits."""
    word = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8, person=b"diptych-draw").digest()
    return (int.from_bytes(word, "little") >> 11) * 2.0**-53


class Sampler:
    """Chooses one token per row. Remembers only penalty counts, which it can rebuild from the log."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos_token_ids = eos_token_ids
        self._counts: dict[str, PenaltyCounts] = {}

    def sample(self, logits: Tensor, sequences: Rows[Sequence]) -> list[SampledToken]:
        """The next token of each sequence, from logits [R, vocab_size]. Raises EngineCorrupt."""
        if not sequences:
            return []
        logits = logits.float()
        _check_finite(logits, sequences)
        scores = self._adjusted(logits, sequences)
        tokens = scores.argmax(dim=-1)
        drawn = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.temperature > 0]
        if drawn:
            tokens[drawn] = draw(scores[drawn], [sequences[row] for row in drawn])
        return _with_logprobs(tokens, logits, sequences)

    def forget(self, request_id: str) -> None:
        """Drop the counts of a request."""
        self._counts.pop(request_id, None)

    def _adjusted(self, logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
        """Logits after bias, min_tokens and penalties: `logits` itself if no row asks for any."""
        scores = logits
        for row, sequence in enumerate(sequences):
            params = sequence.request.sampling
            barred = self._stop_tokens(params) if sequence.num_output_tokens < params.min_tokens else []
            if not (params.logit_bias or barred or needs_counts(params)):
                continue
            if scores is logits:
                scores = logits.clone()
            if params.logit_bias:
                tokens, biases = zip(*params.logit_bias, strict=True)
                scores[row].index_add_(0, _indices(tokens, scores), torch.tensor(biases, device=scores.device))
            if barred:
                scores[row, _indices(barred, scores)] = -torch.inf
            if needs_counts(params):
                self._counts_of(sequence, scores).apply(scores[row], params)
        return scores

    def _stop_tokens(self, params: SamplingParams) -> list[int]:
        """The tokens that would end the stream. With ignore_eos the end-of-sequence token is none of them."""
        return [*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids)]

    def _counts_of(self, sequence: Sequence, scores: Tensor) -> PenaltyCounts:
        counts = self._counts.get(sequence.request_id)
        if counts is None or not counts.belongs_to(sequence):
            counts = PenaltyCounts(sequence, scores.shape[-1], scores.device)
            self._counts[sequence.request_id] = counts
        counts.catch_up()
        return counts


def draw(scores: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """Sampled token ids [R] from adjusted logits [R, vocab_size]; all temperatures must be positive."""
    params = [sequence.request.sampling for sequence in sequences]
    tempered = scores.double()
    # Shifted first, so that a tiny temperature gives minus infinity but never an overflow.
    tempered -= tempered.amax(dim=-1, keepdim=True)
    tempered /= _column([each.temperature for each in params], tempered)
    _truncate(tempered, params)
    cumulative = tempered.exp_().cumsum(dim=-1)
    total = cumulative[:, -1:]
    chance = _column([uniform(s.request.sampling.seed, s.num_output_tokens) for s in sequences], tempered)
    # Rounding must not lift the target to the total, where no token is left.
    target = torch.minimum(chance * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _truncate(scores: Tensor, params: list[SamplingParams]) -> None:
    """Apply top_k, top_p, then min_p in place to tempered scores [R, vocab_size] whose maximum is 0.

    Each drops what scores below a threshold, so tokens that tie with the last one kept are kept too.
    """
    vocab_size = scores.shape[-1]
    rows = [row for row, each in enumerate(params) if 0 < each.top_k < vocab_size]
    if rows:
        _drop_below(scores, rows, _top_k_threshold(scores[rows], [params[row].top_k for row in rows]))
    rows = [row for row, each in enumerate(params) if each.top_p < 1.0]
    if rows:
        _drop_below(scores, rows, _top_p_threshold(scores[rows], [params[row].top_p for row in rows]))
    rows = [row for row, each in enumerate(params) if each.min_p > 0.0]
    if rows:
        _drop_below(scores, rows, _column([params[row].min_p for row in rows], scores).log())


def _drop_below(scores: Tensor, rows: list[int], threshold: Tensor) -> None:
    some = scores[rows]
    scores[rows] = some.masked_fill_(some < threshold, -torch.inf)


def _top_k_threshold(scores: Tensor, top_k: list[int]) -> Tensor:
    """The k-th highest score, [R, 1]."""
    highest = scores.topk(max(top_k), dim=-1).values
    return highest.gather(1, _indices(top_k, scores)[:, None] - 1)


def _top_p_threshold(scores: Tensor, top_p: list[float]) -> Tensor:
    """The lowest score of the smallest set of tokens whose probabilities reach top_p (Holtzman et al. 2020), [R, 1]."""
    wanted = _column(top_p, scores)
    total = scores.exp().sum(dim=-1, keepdim=True)
    for candidates in (TOP_P_CANDIDATES, scores.shape[-1]):
        highest = scores.topk(min(candidates, scores.shape[-1]), dim=-1).values
        probabilities = highest.exp() / total
        reached = probabilities.cumsum(dim=-1)
        if bool((reached[:, -1:] >= wanted).all()):
            break
    kept = (reached - probabilities < wanted).sum(dim=-1, keepdim=True)
    return highest.gather(1, kept - 1)


def _check_finite(logits: Tensor, sequences: Rows[Sequence]) -> None:
    # Finite float32 values cannot overflow a float64 sum.
    finite = logits.sum(dim=-1, dtype=torch.float64).isfinite()
    if not bool(finite.all()):
        bad = [sequences[row].request_id for row in (~finite).nonzero()[:, 0].tolist()]
        raise EngineCorrupt(tuple(bad))


def _with_logprobs(tokens: Tensor, logits: Tensor, sequences: Rows[Sequence]) -> list[SampledToken]:
    sampled = [SampledToken(token) for token in tokens.tolist()]
    for row, sequence in enumerate(sequences):
        wanted = sequence.request.sampling.logprobs
        if wanted is None:
            continue
        logprobs = logits[row].log_softmax(dim=-1)
        token = sampled[row].token_id
        values, indices = logprobs.topk(min(wanted, len(logprobs)))
        top = tuple(zip(indices.tolist(), values.tolist(), strict=True))
        sampled[row] = SampledToken(token, logprobs[token].item(), top)
    return sampled


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _indices(values: Rows[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)
