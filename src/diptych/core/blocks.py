"""Block hashes: the one chained hash that engine, router and simulator share.

A block's hash covers its own tokens and, through its parent's hash, everything before it, so equal
hashes mean equal prefixes (and, with the same model, equal KV).

    root(salt) -> h0 = H(root, tokens[0:16]) -> h1 = H(h0, tokens[16:32]) -> ...
"""

from __future__ import annotations

import array
import hashlib
import sys
from collections.abc import Sequence

BlockId = int
BlockHash = bytes

HASH_BYTES = 16


def root_hash(salt: str = "") -> BlockHash:
    """The parent of the first block. Another salt (tenant) opens another, disjoint tree."""
    return hashlib.blake2b(
        salt.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES, person=b"diptych-root"
    ).digest()


def hash_block(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of one full block. Token ids must fit 32 unsigned bits (OverflowError otherwise)."""
    packed = array.array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return hashlib.blake2b(packed.tobytes(), digest_size=HASH_BYTES, key=parent).digest()


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str = "") -> list[BlockHash]:
    """Hashes of all full blocks of a token sequence, first to last."""
    hashes: list[BlockHash] = []
    extend_block_hashes(hashes, token_ids, block_size, salt)
    return hashes


def extend_block_hashes(hashes: list[BlockHash], token_ids: Sequence[int], block_size: int, salt: str = "") -> None:
    """Append to `hashes` what is missing for the full blocks of `token_ids`."""
    parent = hashes[-1] if hashes else root_hash(salt)
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = hash_block(parent, token_ids[start : start + block_size])
        hashes.append(parent)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many blocks hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)
