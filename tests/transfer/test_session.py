"""Public sessions: what is pushed is pulled, and every way in which it can end is told to both sides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diptych.core.errors import TicketError, TransferError
from diptych.core.kv_layout import KVLayout
from diptych.core.request import SampledToken
from diptych.policy.block_pool import BlockPool, OutOfBlocks
from diptych.policy.handoff import SourceState
from diptych.transfer.session import KVSource, KVTarget, SourceSession
from diptych.wire.tickets import open_ticket

KEY = b"k" * 32
LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype="float32", block_size=4)
NUM_BLOCKS = 16
NUM_TOKENS = 18  # five blocks, the last one not full
KV = np.random.default_rng(1).random((3, 5, 2, 2, 4, 4), dtype=np.float32)
SECONDS = 20
ADDRESSES = {"shm": "unix:{}/kv", "tcp": "tcp:127.0.0.1:0", "local": None}


class Pair:
    """A source and a target, and what they hand over."""

    def __init__(self, address: str | None) -> None:
        self.pool = BlockPool(NUM_BLOCKS, LAYOUT.block_size)
        self.target = KVTarget(LAYOUT, NUM_BLOCKS, key=KEY, address=address, pool=self.pool)
        self.source = KVSource(key=KEY)

    def open(self, name: str = "s", **options: Any) -> SourceSession:
        """Expected by the target, and begun by the source."""
        ticket = self.target.expect(name, NUM_TOKENS, **options)
        return self.source.create_session(name, LAYOUT, ticket, self.target.address or self.target)

    def is_alive_and_whole(self) -> None:
        """Every block is back, and the next session is as good as the first one."""
        assert self.target.drain(0.0)
        self.target._draining = False
        assert self.pool.num_used == 0
        with self.open("next") as session:
            session.push(KV)
            session.close(1)
            session.wait(SECONDS)
        assert_equal(self.target, "next")
        self.target.release("next")
        assert self.pool.num_used == 0
        assert self.source.drain(SECONDS)
        assert not any(session.unread and session.failure is None for session in self.target._sessions.values())


def assert_equal(target: KVTarget, name: str) -> None:
    pulled = target.pull(name, SECONDS)
    for layer in range(LAYOUT.num_layers):
        assert np.array_equal(of_tokens(pulled.layer(layer)), of_tokens(KV[layer]))


def of_tokens(blocks: Any) -> Any:
    """Without the slots past the last token, which do not move: [K or V, kv_head, token, head_dim]."""
    return np.concatenate(list(blocks), axis=2)[:, :, :NUM_TOKENS]


def code_of(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(TransferError) as caught:
        call(*arguments)
    return caught.value.code


@pytest.fixture(params=ADDRESSES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    address = ADDRESSES[request.param]
    made = Pair(address and address.format(tmp_path))
    yield made
    made.source.close()
    made.target.close()


def all_at_once(session: SourceSession) -> None:
    session.push(KV)


def layer_by_layer(session: SourceSession) -> None:
    for layer in range(LAYOUT.num_layers):
        session.push({layer: KV[layer]}, LAYOUT)


def chunk_by_chunk(session: SourceSession) -> None:
    for first, end in ((0, 2), (2, 5)):
        session.push(torch.from_numpy(KV), blocks=range(first, end), first_block=first)


def some_layers_of_scattered_blocks(session: SourceSession) -> None:
    shuffled = KV[:, [3, 1, 4, 0, 2]].copy()
    for layers in ([2], [0, 1]):
        session.push(shuffled, layers=layers, blocks=[3, 1, 4, 0, 2])


@pytest.mark.parametrize("push", [all_at_once, layer_by_layer, chunk_by_chunk, some_layers_of_scattered_blocks])
def test_what_is_pushed_is_pulled(pair: Pair, push: Callable[[SourceSession], None]) -> None:
    with pair.open() as session:
        push(session)
        session.close(SampledToken(7, -0.5), b"and so on")
        session.wait(SECONDS)
    assert session.state is SourceState.RELEASED
    pulled = pair.target.pull("s", SECONDS)
    assert (pulled.token, pulled.payload, pulled.num_tokens) == (SampledToken(7, -0.5), b"and so on", NUM_TOKENS)
    assert_equal(pair.target, "s")
    pair.target.release("s")
    pair.is_alive_and_whole()


def test_a_shared_prefix_is_not_sent(pair: Pair) -> None:
    present = pair.pool.allocate(2)
    session = pair.open(present=present)
    assert session.missing == range(2, 5)
    with pytest.raises(ValueError, match="missing"):
        session.push(KV)
    session.push(KV, blocks=range(2, 5))
    session.close(1)
    pulled = pair.target.pull("s", SECONDS)
    assert pulled.blocks[:2] == tuple(present)
    assert np.array_equal(of_tokens(pulled.layer(1))[:, :, 8:], of_tokens(KV[1])[:, :, 8:])
    assert not pulled.layer(1)[:2].any()
    pair.target.release("s")
    assert pair.pool.num_used == len(present)
    pair.pool.release(present)
    pair.is_alive_and_whole()


@pytest.mark.parametrize("pushed", [0, 1, 3])
def test_an_abort_by_the_source_reaches_the_target(pair: Pair, pushed: int) -> None:
    with pair.open() as session:
        for layer in range(pushed):
            session.push({layer: KV[layer]})
    assert code_of(session.wait, SECONDS) == "aborted"
    assert code_of(pair.target.pull, "s", SECONDS) == "handoff_abandoned"
    assert pair.target.drain(SECONDS)
    pair.is_alive_and_whole()


@pytest.mark.parametrize("pushed", [0, 1, 3])
def test_an_abort_by_the_target_reaches_the_source(pair: Pair, pushed: int) -> None:
    session = pair.open()
    for layer in range(pushed):
        session.push({layer: KV[layer]})
    pair.target.abort("s")
    assert code_of(session.wait, SECONDS) in ("cancelled", "ticket_refused")
    assert code_of(session.push, KV) in ("cancelled", "ticket_refused")
    assert code_of(pair.target.pull, "s", SECONDS) == "aborted"
    assert pair.target.drain(SECONDS)
    pair.is_alive_and_whole()


def test_a_session_nobody_fills_ends_with_its_lease(pair: Pair) -> None:
    pair.target.expect("s", NUM_TOKENS, lease=0.01)
    assert code_of(pair.target.pull, "s", SECONDS) == "lease_expired"
    pair.is_alive_and_whole()


def test_a_target_whose_lease_ends_tells_the_source(pair: Pair) -> None:
    session = pair.open(lease=0.01)
    assert code_of(session.wait, SECONDS) in ("cancelled", "ticket_refused")
    assert code_of(pair.target.pull, "s", SECONDS) == "lease_expired"
    assert pair.target.drain(SECONDS)
    pair.is_alive_and_whole()


def test_a_source_whose_lease_ends_tells_the_target(pair: Pair) -> None:
    ticket = pair.target.expect("s", NUM_TOKENS)
    session = pair.source.create_session("s", LAYOUT, ticket, pair.target.address or pair.target, lease=0.01)
    assert code_of(session.wait, SECONDS) == "lease_expired"
    assert code_of(pair.target.pull, "s", SECONDS) == "handoff_abandoned"
    assert pair.target.drain(SECONDS)
    pair.is_alive_and_whole()


def test_kv_that_nobody_reads_is_given_up_with_its_lease(pair: Pair) -> None:
    session = pair.open(lease=0.3)
    session.push(KV)
    session.close(1)
    session.wait(SECONDS)
    assert pair.target.drain(SECONDS)  # which here waits for the lease
    assert code_of(pair.target.pull, "s", SECONDS) == "unknown_session"
    pair.is_alive_and_whole()


def test_a_drain_waits_for_unread_kv(pair: Pair) -> None:
    session = pair.open()
    assert not pair.target.drain(0.0)
    assert code_of(pair.target.expect, "another", NUM_TOKENS) == "draining"
    assert not pair.source.drain(0.0)
    session.push(KV)
    session.close(1)
    assert pair.source.drain(SECONDS)
    assert not pair.target.drain(0.0)
    drained = threading.Event()
    waiting = threading.Thread(target=lambda: pair.target.drain(SECONDS) and drained.set())
    waiting.start()
    pair.target.pull("s", SECONDS)
    waiting.join()
    assert drained.is_set()
    pair.target.release("s")
    pair.is_alive_and_whole()


def test_a_source_that_is_closed_aborts_its_sessions(pair: Pair) -> None:
    session = pair.open()
    session.push({0: KV[0]})
    pair.source.close()
    assert code_of(session.wait, SECONDS) == "aborted"
    assert code_of(pair.target.pull, "s", SECONDS) == "handoff_abandoned"
    with pytest.raises(ValueError, match="closed"):
        pair.open("t")
    pair.target.abort("t")
    pair.source = KVSource(key=KEY)
    assert pair.target.drain(SECONDS)
    pair.is_alive_and_whole()


def test_a_lost_connection_fails_its_sessions_on_both_sides(pair: Pair) -> None:
    session = pair.open()
    session.push({0: KV[0]})
    with pair.open("begun") as later:
        later.push(KV)
        later.close(1)
        later.wait(SECONDS)  # so the first one has begun
    for link in pair.source._links.values():
        link.end()
    assert code_of(session.wait, SECONDS) == "transfer_failed"
    assert code_of(pair.target.pull, "s", SECONDS) == "transfer_failed"
    pair.target.pull("begun")
    pair.target.release("begun")
    assert pair.target.drain(SECONDS)
    pair.is_alive_and_whole()  # over a new connection


def test_a_lost_target_fails_its_sessions(pair: Pair) -> None:
    session = pair.open()
    untouched = pair.target.expect("t", 1)
    session.push({0: KV[0]})
    pair.target.close()
    assert code_of(session.wait, SECONDS) in ("transfer_failed", "ticket_refused", "cancelled")
    assert code_of(pair.target.pull, "s", SECONDS) in ("transfer_failed", "closed")
    assert code_of(pair.target.pull, "t", SECONDS) == "closed"
    late = pair.source.create_session("t", LAYOUT, untouched, pair.target.address or pair.target)
    assert code_of(late.wait, SECONDS) == "transfer_failed"
    assert pair.pool.num_used == 0


def test_a_session_closed_too_early_fails_on_both_sides(pair: Pair) -> None:
    session = pair.open()
    session.push(KV, layers=[0, 2])
    session.close(1)
    assert code_of(session.wait, SECONDS) == "transfer_failed"
    assert code_of(pair.target.pull, "s", SECONDS) == "transfer_failed"
    assert pair.target.drain(SECONDS)
    pair.is_alive_and_whole()


@pytest.mark.fault(28)
def test_a_ticket_is_good_once(pair: Pair) -> None:
    ticket = pair.target.expect("s", NUM_TOKENS)
    where = pair.target.address or pair.target
    with pair.source.create_session("s", LAYOUT, ticket, where) as session:
        session.push(KV)
        session.close(1)
        session.wait(SECONDS)
    again = pair.source.create_session("s", LAYOUT, ticket, where)
    assert code_of(again.wait, SECONDS) == "ticket_refused"
    assert code_of(again.push, KV) == "ticket_refused"
    assert_equal(pair.target, "s")
    pair.target.release("s")
    pair.is_alive_and_whole()


@pytest.mark.fault(28)
def test_foreign_tickets_are_refused(pair: Pair) -> None:
    ticket = pair.target.expect("s", NUM_TOKENS)
    where = pair.target.address or pair.target
    with pytest.raises(TicketError, match="minted"):
        KVSource(key=b"x" * 32).create_session("s", LAYOUT, ticket, where)
    with pytest.raises(TicketError, match="session 's'"):
        pair.source.create_session("t", LAYOUT, ticket, where)
    with pytest.raises(TicketError, match="model"):
        KVSource(key=KEY, model="another").create_session("s", LAYOUT, ticket, where)
    pair.target.abort("s")
    pair.is_alive_and_whole()


def test_misuse_is_refused_and_harms_nothing(pair: Pair) -> None:
    ticket = pair.target.expect("s", NUM_TOKENS)
    session = pair.source.create_session("s", LAYOUT, ticket, pair.target.address or pair.target)
    other = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype="float32", block_size=8)
    with pytest.raises(ValueError, match="another layout"):
        session.push(KV, other)
    with pytest.raises(ValueError, match="has no blocks"):
        session.push(KV, blocks=[4, 5])
    with pytest.raises(ValueError, match="layers"):
        session.push({0: KV[0]}, layers=[1])
    with pytest.raises(ValueError, match="missing"):
        session.push(KV, first_block=1)
    with pytest.raises(ValueError, match="already"):
        pair.source.create_session("s", LAYOUT, ticket, "unix:/nowhere")
    with pytest.raises(ValueError, match="already"):
        pair.target.expect("s", 1)
    with pytest.raises(ValueError, match="present"):
        pair.target.expect("u", 1, present=[0, 1])
    with pytest.raises(ValueError, match="limit"):
        session.close(1, bytes(1 << 20))
    with pytest.raises(ValueError, match="abort it"):
        pair.target.release("s")
    with pytest.raises(OutOfBlocks):
        pair.target.expect("u", 1000)
    with pytest.raises(TimeoutError):
        pair.target.pull("s", 0.0)
    assert code_of(pair.target.pull, "u") == "unknown_session"
    assert code_of(pair.target.release, "u") == "unknown_session"
    pair.target.abort("u")
    session.push(KV)
    session.close(1)
    with pytest.raises(ValueError, match="closed"):
        session.push(KV)
    session.wait(SECONDS)
    assert_equal(pair.target, "s")
    pair.target.release("s")
    pair.is_alive_and_whole()


def test_another_model_is_refused(pair: Pair) -> None:
    ticket = pair.target.expect("s", NUM_TOKENS)
    other = replace(LAYOUT, num_kv_heads=4)
    with pytest.raises(ValueError, match="num_kv_heads is 4 on one side and 2 on the other"):
        pair.source.create_session("s", other, ticket, pair.target.address or pair.target)
    pair.target.abort("s")
    assert pair.target.drain(SECONDS)
    pair.is_alive_and_whole()


def test_many_sessions_at_once_come_whole(pair: Pair) -> None:
    names = ["a", "b", "c"]
    sessions = [pair.open(name) for name in names]
    for layer in range(LAYOUT.num_layers):
        for session in sessions:
            session.push({layer: KV[layer]})
    for number, session in enumerate(sessions):
        session.close(number)
    for number, name in enumerate(names):
        assert pair.target.pull(name, SECONDS).token == SampledToken(number)
        assert_equal(pair.target, name)
        pair.target.release(name)
    pair.is_alive_and_whole()


def test_a_ticket_names_its_salt() -> None:
    with KVTarget(LAYOUT, NUM_BLOCKS, key=KEY) as target:
        assert open_ticket(target.expect("s", 1, salt="tenant"), KEY).salt == "tenant"
