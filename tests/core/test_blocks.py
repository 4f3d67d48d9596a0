from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.blocks import HASH_BYTES, block_hashes, blocks_for, extend_block_hashes, hash_block, root_hash

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)
block_sizes = st.integers(1, 9)


@given(token_ids=tokens, block_size=block_sizes, salt=st.text(max_size=3))
def test_only_full_blocks_are_hashed(token_ids: list[int], block_size: int, salt: str) -> None:
    hashes = block_hashes(token_ids, block_size, salt)
    assert len(hashes) == len(token_ids) // block_size
    assert all(len(block_hash) == HASH_BYTES for block_hash in hashes)
    assert len(set(hashes)) == len(hashes)


@given(token_ids=tokens, block_size=block_sizes, cut=st.integers(0, 40))
def test_growing_log_extends_its_hashes(token_ids: list[int], block_size: int, cut: int) -> None:
    hashes = block_hashes(token_ids[:cut], block_size)
    extend_block_hashes(hashes, token_ids, block_size)
    assert hashes == block_hashes(token_ids, block_size)


@given(token_ids=st.lists(st.integers(0, 99), min_size=1, max_size=40), block_size=block_sizes, data=st.data())
def test_a_changed_token_changes_its_block_and_all_after(
    token_ids: list[int], block_size: int, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(token_ids) - 1))
    changed = [*token_ids]
    changed[position] += 1
    hashes, others = block_hashes(token_ids, block_size), block_hashes(changed, block_size)
    block = position // block_size
    assert hashes[:block] == others[:block]
    assert not set(hashes[block:]) & set(others[block:])


def test_hash_is_the_same_on_every_machine() -> None:
    """Router and workers may run on different machines, so the bytes are fixed: little-endian, 32 bits."""
    parent = root_hash()
    assert parent == hashlib.blake2b(b"", digest_size=16, person=b"diptych-root").digest()
    packed = bytes([1, 0, 0, 0, 0, 1, 0, 0])
    assert hash_block(parent, [1, 256]) == hashlib.blake2b(packed, digest_size=16, key=parent).digest()


def test_salts_open_disjoint_trees() -> None:
    trees = [set(block_hashes(range(32), 4, salt)) for salt in ("", "a", "b", "\ud800")]
    assert len(set.union(*trees)) == sum(map(len, trees))


@pytest.mark.parametrize("token", [-1, 2**32])
def test_tokens_must_fit_32_bits(token: int) -> None:
    with pytest.raises(OverflowError):
        hash_block(root_hash(), [token])


@given(num_tokens=st.integers(0, 10**6), block_size=st.integers(1, 256))
def test_blocks_for_is_the_least_that_holds(num_tokens: int, block_size: int) -> None:
    blocks = blocks_for(num_tokens, block_size)
    assert (blocks - 1) * block_size < num_tokens <= blocks * block_size
