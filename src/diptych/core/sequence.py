"""A sequence is a log: prompt tokens, then emitted tokens. Everything else can be rebuilt from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from diptych.core.blocks import BlockHash, BlockId
from diptych.core.request import Request


class SequenceStatus(StrEnum):
    WAITING = "waiting"  # wants to run; holds no blocks, or only cached ones
    RECEIVING = "receiving"  # holds blocks that a prefill worker is filling
    RUNNING = "running"  # takes part in steps
    HELD = "held"  # prefilled here; blocks kept until the decode worker has accepted them
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One token stream inside a worker. Mutated only by policy, and never while a step that it
    takes part in is running, so an engine may read it without a copy (until it has dropped its row).

    Attributes:
        token_ids: the log, prompt then output.
        num_prompt_tokens: where the output begins.
        num_computed_tokens: how many leading tokens have KV in the blocks of `block_table`, now.
        num_cached_tokens: prefix-cache hit at admission; never changes afterwards.
        block_table: block i holds the tokens [i * block_size, (i + 1) * block_size).
        block_hashes: hashes of the leading full blocks, extended as the log grows.
        data_rank: the data-parallel rank that its blocks belong to.
        pinned: a sender reads its blocks, so it must not be preempted.
    """

    request: Request
    token_ids: list[int]
    num_prompt_tokens: int
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[BlockId] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)
    data_rank: int = 0
    pinned: bool = False

    @classmethod
    def from_log(cls, request: Request, output_token_ids: tuple[int, ...] = ()) -> Sequence:
        """The sequence that continues a log, wherever it began."""
        tokens = [*request.prompt_token_ids, *output_token_ids]
        return cls(request=request, token_ids=tokens, num_prompt_tokens=len(request.prompt_token_ids))

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens that have no KV yet. 1 for a sequence that decodes, more while it prefills."""
        return len(self.token_ids) - self.num_computed_tokens


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's share of a step: compute KV of `num_tokens` tokens from position `start`.

    `samples` says that this share reaches the end of the log, so the step yields its next token.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes. There are no phases: a decode is a share of one token."""

    rows: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)
