"""A rank's ties to the others of its worker: collectives of torch.distributed, over gloo or NCCL.

    tensor ranks of one stage       add up partial results, gather logits
    data ranks of one tensor rank   exchange rows of experts
    stages                          pass hidden states on, each tensor rank to its counterpart

Every rank takes part in every step, and calls these in the same order. Rows of a step are the same for all
tensor ranks and stages of a data-parallel rank, so all of them know when there are none, and skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from diptych.core.kv_layout import KVLayout
from diptych.engine.torch_engine.experts import Exchange
from diptych.engine.torch_engine.shard import Shard

# A rank that dies is noticed at once (its connections end), and one that hangs by its leader (`rank_processes`).
PATIENCE = timedelta(days=365)


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What a rank can do with others; None where there is nobody to do it with."""

    add_up: Callable[[Tensor], Tensor] | None = None  # over tensor ranks, in place
    gather: Callable[[Tensor], Tensor] | None = None  # [N, part of the vocabulary] to [N, vocab_size], on tensor rank 0
    exchange: Exchange | None = None  # over the data-parallel ranks of a tensor rank
    receive: Callable[[Tensor], None] | None = None  # fills hidden states in, from the stage before
    send: Callable[[Tensor], None] | None = None  # to the stage after


ALONE = Links()


def connect(shard: Shard, rendezvous: str, device: torch.device) -> Links:
    """Meet all other ranks of the worker at `rendezvous`, the path of a file that does not exist yet, and is not
    needed any more afterwards."""
    layout, rank = shard.layout, shard.rank
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(rendezvous, layout.world_size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=layout.world_size,
        timeout=PATIENCE,
        device_id=device if device.type == "cuda" else None,
    )
    tensor = _group(rank, _tensor_groups(layout)) if layout.tensor_parallel > 1 else None
    column = _group(rank, _columns(layout)) if layout.data_parallel > 1 and shard.spreads_experts else None
    links = Links(
        add_up=None if tensor is None else tensor.add_up,
        gather=None if tensor is None else _Head(tensor, shard.config.vocab_size).gather,
        exchange=None if column is None else column.exchange,
        receive=None if shard.is_first else Neighbour(rank - layout.tensor_parallel).receive,
        send=None if shard.is_last else Neighbour(rank + layout.tensor_parallel).send,
    )
    _try_out(links, shard, device)
    return links


def _try_out(links: Links, shard: Shard, device: torch.device) -> None:
    """Use everything once: NCCL connects only then, and needs the rendezvous for it."""
    number = torch.zeros(1, 1, device=device)
    if links.receive is not None:
        links.receive(number)
    if links.add_up is not None:
        links.add_up(number)
    if links.gather is not None:
        links.gather(torch.zeros(1, len(shard.vocabulary), device=device))
    if links.exchange is not None:
        one_each = [1] * shard.layout.data_parallel
        links.exchange(torch.zeros(len(one_each), 1, device=device), one_each, one_each)
    if links.send is not None:
        links.send(number)


def _tensor_groups(layout: KVLayout) -> Iterable[list[int]]:
    size = layout.tensor_parallel
    return (list(range(first, first + size)) for first in range(0, layout.world_size, size))


def _columns(layout: KVLayout) -> Iterable[list[int]]:
    """Ranks that differ only in their data-parallel rank."""
    distance = layout.pipeline_parallel * layout.tensor_parallel
    return (list(range(first, layout.world_size, distance)) for first in range(distance))


def _group(rank: int, groups: Iterable[list[int]]) -> Group:
    """The one that has `rank` in it. All ranks must make all groups, in the same order."""
    return next(group for group in list(map(Group, groups)) if rank in group.ranks)


class Group:
    """Ranks that compute together."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks
        everybody = len(ranks) == dist.get_world_size()  # there is a group of them already
        self.group = dist.group.WORLD if everybody else dist.new_group(ranks, timeout=PATIENCE)

    def add_up(self, partial: Tensor) -> Tensor:
        """The sum over all ranks, in `partial`. Every rank gets the same bits."""
        if partial.numel():
            dist.all_reduce(partial, group=self.group)
        return partial

    def exchange(self, rows: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """See `experts.Exchange`."""
        received = rows.new_empty(sum(receives), *rows.shape[1:])
        dist.all_to_all_single(received, rows, list(receives), list(sends), group=self.group)
        return received


class _Head:
    """Puts the parts of the vocabulary together where tokens are chosen: on the first rank of a group."""

    def __init__(self, group: Group, vocab_size: int) -> None:
        self._group = group
        self._vocab_size = vocab_size

    def gather(self, part: Tensor) -> Tensor:
        """[N, part] of each rank to [N, vocab_size]; on the other ranks the result is of no use."""
        first = self._group.ranks[0]
        if not len(part):
            return part.new_empty(0, self._vocab_size)
        parts = [torch.empty_like(part) for _ in self._group.ranks] if dist.get_rank() == first else None
        dist.gather(part, parts, dst=first, group=self._group.group)
        return part if parts is None else torch.cat(parts, dim=1)[:, : self._vocab_size]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """The same tensor rank in the stage before or after."""

    rank: int

    def receive(self, hidden: Tensor) -> None:
        if hidden.numel():
            dist.recv(hidden, self.rank)

    def send(self, hidden: Tensor) -> None:
        if hidden.numel():
            dist.send(hidden.contiguous(), self.rank)
