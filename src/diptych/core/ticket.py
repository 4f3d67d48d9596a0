"""What a ticket grants: the right to write one request's pages into one worker's reserved blocks, once.

On the wire a ticket is opaque, authenticated bytes (`wire.tickets`); these are the claims inside.
"""

from __future__ import annotations

from dataclasses import dataclass

from diptych.core.blocks import BlockId
from diptych.core.fleet import Epoch, WorkerId
from diptych.core.kv_layout import KVLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketClaims:
    """`blocks` is the target's whole block table for the log's `num_tokens` tokens; its first
    `first_block` entries are already present there (prefix cache) and must not be written."""

    request_id: str
    worker_id: WorkerId  # the target that minted it
    epoch: Epoch  # of that target; after a restart the ticket is void
    blocks: tuple[BlockId, ...]
    first_block: int
    num_tokens: int
    layout: KVLayout  # of the target: with the blocks, it says where every byte belongs
    data_rank: int = 0  # the target's data-parallel rank that the blocks belong to
    model_digest: str
    salt: str
    nonce: bytes
