"""A sparse mixture of experts (Shazeer et al. 2017): each token goes through the few feed-forwards a router picks.

    rows -> Router -> Routing -> group_by_expert -> rows in expert order -> compute -> combine -> rows

`compute` is where the experts are. It sees rows grouped by expert and how many each expert has, and answers in
the same order, so one whose experts lie on several ranks sends each rank one slice of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from diptych.engine.torch_engine.linear import Linear
from diptych.engine.torch_engine.mlp import FeedForward

# Rows [A, hidden] in expert order, which it may overwrite, and the number of them for each expert; returns
# [A, hidden].
ComputeExperts = Callable[[Tensor, Sequence[int]], Tensor]

# All-to-all: rows [N, ...], of which sends[i] consecutive ones go to rank i, and receives[i] come from it; returns
# those that come, in order of ranks.
Exchange = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each of T tokens goes to: ids [T, k], int64, the heaviest first, and weights [T, k]."""

    experts: Tensor
    weights: Tensor


class Router:
    """Picks the `per_token` experts of highest probability; `normalized` makes their weights add up to 1.

    Probabilities are a softmax over all experts in float32, whatever the logits are in, as in the published
    Mixtral and Qwen3-MoE. Among equal probabilities `torch.topk` picks as it does there.
    """

    def __init__(self, gate: Linear, per_token: int, normalized: bool) -> None:
        self._gate = gate
        self._per_token = per_token
        self._normalized = normalized

    def __call__(self, rows: Tensor) -> Routing:
        """Rows [T, hidden]; the weights come in their dtype."""
        probabilities = self._gate(rows).softmax(dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self._per_token, dim=-1)
        if self._normalized:
            weights /= weights.sum(dim=-1, keepdim=True)
        return Routing(experts, weights.to(rows.dtype))


@dataclass(frozen=True, slots=True)
class Groups:
    """The A = T * k pairs of a token and an expert, in order of experts and, within one, of tokens.

    `tokens` [A] is the token of each pair, `places` [T, k] where each pair of a routing has gone, and `counts`
    the number of pairs of each expert.
    """

    tokens: Tensor
    places: Tensor
    counts: list[int]


def group_by_expert(experts: Tensor, num_experts: int) -> Groups:
    """Sort the pairs of a routing, experts [T, k], by expert."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    return Groups(order // experts.shape[1], places.view_as(experts), counts)


def combine(outputs: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum [T, hidden] of each token's k rows of `outputs` [A, hidden], found at `places` [T, k]."""
    return functional.embedding_bag(places, outputs, mode="sum", per_sample_weights=weights)


class LocalExperts:
    """All experts in this process: one feed-forward per expert that has rows, none for the others."""

    def __init__(self, experts: Sequence[FeedForward]) -> None:
        self._experts = tuple(experts)

    def __call__(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """See `ComputeExperts`. In place: a second tensor of that size would cost its page faults anew each time."""
        first = 0
        for expert, count in zip(self._experts, counts, strict=True):
            if count:
                some = rows[first : first + count]
                some.copy_(expert(some))
                first += count
        return rows


class ColumnOfExperts:
    """The experts of one tensor rank, a run of them: the other ranks' rows come to nothing here, and what the
    ranks have come to is added up."""

    def __init__(self, experts: range, compute: ComputeExperts) -> None:
        self._experts = experts
        self._compute = compute

    def __call__(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """See `ComputeExperts`."""
        first = sum(counts[: self._experts.start])
        end = first + sum(counts[self._experts.start : self._experts.stop])
        rows[:first] = 0
        rows[end:] = 0
        rows[first:end] = self._compute(rows[first:end], counts[self._experts.start : self._experts.stop])
        return rows


class SpreadExperts:
    """Experts spread over ranks that have rows of their own each, in equal runs: every row goes to the rank of
    its expert and back (the all-to-all of GShard, Lepikhin et al. 2020). All ranks must call it together,
    with or without rows. `compute` has this rank's experts."""

    def __init__(self, num_ranks: int, exchange: Exchange, compute: ComputeExperts) -> None:
        self._num_ranks = num_ranks
        self._exchange = exchange
        self._compute = compute

    def __call__(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """See `ComputeExperts`. Counts travel first, so that everybody knows how many rows will come."""
        one_each = [1] * self._num_ranks
        leaving = torch.tensor(counts, device=rows.device).view(self._num_ranks, -1)
        coming = self._exchange(leaving, one_each, one_each)  # [from rank, expert of this rank]
        num_leaving, num_coming = leaving.sum(dim=1).tolist(), coming.sum(dim=1).tolist()
        arrived = self._exchange(rows, num_leaving, num_coming)
        # They come by rank, then expert; `compute` wants each expert's rows together.
        experts = torch.arange(coming.shape[1], device=rows.device).repeat(self._num_ranks)
        order = experts.repeat_interleave(coming.flatten()).argsort(stable=True)
        outputs = torch.empty_like(arrived)
        outputs[order] = self._compute(arrived[order], coming.sum(dim=0).tolist())
        return self._exchange(outputs, num_coming, num_leaving)


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """A feed-forward of `num_experts` experts, wherever `compute` has them."""

    router: Router
    num_experts: int
    compute: ComputeExperts

    def __call__(self, rows: Tensor) -> Tensor:
        routing = self.router(rows)
        groups = group_by_expert(routing.experts, self.num_experts)
        outputs = self.compute(rows[groups.tokens], groups.counts)
        return combine(outputs, groups.places, routing.weights)
