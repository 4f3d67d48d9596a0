"""The decode side of public sessions. See `transfer.session`."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

from diptych.core.blocks import BlockId, blocks_for
from diptych.core.errors import TransferError
from diptych.core.events import HandoffComplete, HandoffFailed
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.request import SampledToken
from diptych.core.ticket import TicketClaims
from diptych.policy.block_pool import BlockPool
from diptych.policy.handoff import Effect, Side, TargetEvent, TargetState, target_side
from diptych.transfer.arrays import blocks_as_array
from diptych.transfer.leases import Leases
from diptych.transfer.memory import SharedMemory, memory_bytes
from diptych.transfer.receiver import KVReceiver, Target
from diptych.transfer.receiver import TargetEvent as ReceiverEvent
from diptych.wire.key_file import check_key
from diptych.wire.tickets import mint

DEFAULT_LEASE_SECONDS = 60.0
REMEMBER_SECONDS = 60.0  # why a session failed, if nobody asks
NONCE_BYTES = 16


class Blocks(Protocol):
    """Who gives blocks of the target's memory out; `policy.block_pool.BlockPool` does."""

    def allocate(self, count: int) -> list[BlockId]: ...

    def release(self, blocks: Sequence[BlockId]) -> None: ...


@dataclass(frozen=True, slots=True)
class PulledSession:
    """KV that has arrived, verified, in the target's memory. It is the puller's until `KVTarget.release`."""

    session_id: str
    memories: tuple[KVMemory, ...] = field(repr=False)  # of all ranks
    blocks: tuple[BlockId, ...]  # the sequence's whole block table
    data_rank: int  # the data-parallel rank whose blocks they are
    num_tokens: int
    token: SampledToken  # the first one that follows from this KV
    payload: bytes

    def layer(self, index: int, tensor_rank: int = 0) -> npt.NDArray[Any]:
        """One layer's KV on one tensor rank (of the pipeline stage that has the layer), [len(blocks), K or V,
        kv_head of the rank, slot, head_dim]: a view into the target's memory if the blocks are consecutive,
        else a copy. Slots past the last token are as they were. bfloat16 comes as uint16."""
        layout = self.memories[0].layout
        rank = layout.rank(self.data_rank, layout.stage_of(index), tensor_rank)
        return blocks_as_array(self.memories[rank], index, self.blocks)


@dataclass(slots=True, eq=False)
class _Session:
    claims: TicketClaims
    side: Side[TargetState, TargetEvent] = field(default_factory=target_side)
    closing: HandoffComplete | None = None
    failure: TransferError | None = None
    unread: bool = True  # nobody has pulled it, nor will not want to

    @property
    def session_id(self) -> str:
        return self.claims.request_id

    @property
    def owned(self) -> tuple[BlockId, ...]:
        """The blocks that were allocated for it."""
        return self.claims.blocks[self.claims.first_block :]


class KVTarget:
    """Takes sessions in. It owns a KV memory of `num_blocks` blocks for each rank of `layout`, which may be cut in
    any way; sources on this machine write to it themselves. All methods may be called from any thread.

    `key` is the secret that all sources and targets of one fleet share, `model` what both sides must agree
    on, `pool` who gives blocks out (by default a pool for each data-parallel rank). `address` is where sources connect:
    `unix:PATH` (pages travel through shared memory), `tcp:HOST:PORT` (in the connection; port 0 takes a free
    one), `tls:HOST:PORT` (the same, encrypted, for other hosts), or None if they are all in this process.

    Raises ConfigError if there is not so much memory, if the key is too short to be a secret, or for an address that
    leaves this machine without TLS.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        *,
        key: bytes,
        address: str | None = None,
        model: str = "",
        pool: Blocks | None = None,
    ) -> None:
        check_key(key)
        self._key = key
        self._model = model
        self._epoch = time.time_ns()  # tickets of an earlier life are void
        self.layout = layout
        self._pools = [
            BlockPool(num_blocks, layout.block_size) if pool is None else pool for _ in range(layout.data_parallel)
        ]
        self._segments = _take_memory(layout, num_blocks)
        self.memories = tuple(
            KVMemory(layout, num_blocks, segment.buffer, rank) for rank, segment in enumerate(self._segments)
        )
        about = Target(
            key=key,
            epoch=self._epoch,
            memories=self.memories,
            model_digest=model,
            descriptors=tuple(segment.descriptor for segment in self._segments),
        )
        self._changed = threading.Condition()  # guards what follows, and the sessions' states
        self._sessions: dict[str, _Session] = {}
        self._draining = False
        self._closed = False
        self._leases: Leases[_Session] = Leases(self._expire)
        self.receiver = KVReceiver(about, self._on)
        try:
            self.address = None if address is None else self.receiver.listen(address)
        except BaseException:
            self.close()
            raise

    def expect(
        self,
        session_id: str,
        num_tokens: int,
        *,
        present: Sequence[BlockId] = (),
        data_rank: int = 0,
        lease: float = DEFAULT_LEASE_SECONDS,
        salt: str = "",
    ) -> bytes:
        """Reserve blocks for `num_tokens` tokens; returns the ticket with which a source may fill them, once.

        `present` are leading blocks of the sequence that are here already (a shared prefix); they are not
        sent, and stay their owner's. `data_rank` is the data-parallel rank that it goes to. A session that has
        not been pulled within `lease` seconds is ended.

        Raises ValueError if a session of this name is open or there is no such rank, TransferError while draining and
        after the end, and what the pool raises when it is out of blocks (`OutOfBlocks`).
        """
        if data_rank not in range(self.layout.data_parallel):
            raise ValueError(f"data-parallel rank {data_rank} of {self.layout.data_parallel}")
        with self._changed:
            if self._closed:
                raise TransferError("this target has been closed", code="closed")
            if self._draining:
                raise TransferError("this target is draining", code="draining")
            known = self._sessions.get(session_id)
            if known is not None and known.side.state is not TargetState.RELEASED:
                raise ValueError(f"there is a session {session_id!r} already")
            missing = blocks_for(num_tokens, self.layout.block_size) - len(present)
            if missing < 0:
                raise ValueError(f"{len(present)} blocks are present, more than {num_tokens} tokens take")
            claims = TicketClaims(
                request_id=session_id,
                worker_id=self.address or "in this process",
                epoch=self._epoch,
                blocks=(*present, *self._pools[data_rank].allocate(missing)),
                first_block=len(present),
                num_tokens=num_tokens,
                layout=self.layout,
                data_rank=data_rank,
                model_digest=self._model,
                salt=salt,
                nonce=secrets.token_bytes(NONCE_BYTES),
            )
            session = self._sessions[session_id] = _Session(claims)
            self._leases.grant(session, lease)
            self.receiver.expect(claims)
        return mint(claims, self._key)

    def pull(self, session_id: str, timeout: float | None = None) -> PulledSession:
        """Block until all KV of a session is here and verified. Its lease ends; `release` gives the blocks
        back.

        Raises TransferError if it will never be (`code` says why: "kv_corrupt", "transfer_failed",
        "handoff_abandoned" by the source, "aborted" or "closed" here, "lease_expired", "unknown_session");
        then there is nothing to release. TimeoutError if it is not here after `timeout` seconds.
        """
        with self._changed:
            session = self._find(session_id)
            if not self._changed.wait_for(lambda: session.closing or session.failure, timeout):
                raise TimeoutError(f"session {session_id!r} is not here after {timeout} s")
            self._mark_read(session)
            if session.closing is None or session.failure is not None:
                raise session.failure or TransferError("the session has no end")
            claims, closing = session.claims, session.closing
            return PulledSession(
                session_id=session_id,
                memories=self.memories,
                blocks=claims.blocks,
                data_rank=claims.data_rank,
                num_tokens=claims.num_tokens,
                token=closing.token,
                payload=closing.payload,
            )

    def release(self, session_id: str) -> None:
        """The puller needs a session's KV no more: its blocks go back to the pool. Raises TransferError if no
        such session is here, ValueError if it has not arrived."""
        with self._changed:
            session = self._find(session_id)
            if session.side.state is not TargetState.DECODING:
                raise ValueError(f"session {session_id!r} is {session.side.state}; abort it instead")
            self._give_back(session)

    def abort(self, session_id: str) -> None:
        """Nobody wants this session: its source hears of it at once, and its blocks come back when nobody can
        write to them any more. Harmless if there is none."""
        session = self._sessions.get(session_id)
        if session is not None:
            self._end(session, TransferError("the session was aborted by its target", code="aborted"))

    def drain(self, timeout: float | None = None) -> bool:
        """Expect nothing new, and wait until every session has been pulled or has failed, with no writer
        left. False if that takes longer than `timeout` seconds."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: all(map(_is_settled, self._sessions.values())), timeout)

    def close(self) -> None:
        """Take nothing in any more; open sessions fail. The memory goes when the last view into it does."""
        with self._changed:
            closed, self._closed = self._closed, True
        if closed:
            return
        self.receiver.close()
        for session in list(self._sessions.values()):
            if session.failure is None:
                self._end(session, TransferError("the target has been closed", code="closed"))
        self._leases.close()
        for memory, segment in zip(self.memories, self._segments, strict=True):
            with contextlib.suppress(BufferError):
                memory.buffer.release()
            with contextlib.suppress(BufferError):
                segment.close()

    def __enter__(self) -> KVTarget:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on(self, event: ReceiverEvent) -> None:
        """On the receiver's threads, or that of whoever revokes."""
        session = self._sessions.get(event.request_id)
        if session is None:
            return
        if isinstance(event, HandoffComplete):
            self._follow(session, TargetEvent.COMPLETE, closing=event)
        elif isinstance(event, HandoffFailed):
            self._follow(session, TargetEvent.FAILED, failure=TransferError(event.message, code=event.code))
        else:
            self._follow(session, TargetEvent.WRITER_GONE)

    def _expire(self, session: _Session) -> None:
        self._end(session, TransferError("the session's lease ended before it was pulled", code="lease_expired"))

    def _end(self, session: _Session, failure: TransferError) -> None:
        """Whatever state it is in, it is not wanted any more."""
        self._follow(session, TargetEvent.ABORTED, failure=failure)
        with self._changed:
            if session.side.state is TargetState.DECODING:
                session.failure = failure
                self._give_back(session)
            elif session.failure is not failure:  # it had failed already, and nobody has asked why
                self._mark_read(session)

    def _follow(
        self,
        session: _Session,
        event: TargetEvent,
        *,
        closing: HandoffComplete | None = None,
        failure: TransferError | None = None,
    ) -> None:
        """What the table says."""
        with self._changed:
            effects = session.side.on(event)
            if Effect.JOIN_BATCH in effects:
                session.closing = closing
            if Effect.REVOKE_TICKET in effects:
                session.failure = failure
                self._leases.grant(session, REMEMBER_SECONDS)  # so that whoever pulls it learns why
            if Effect.RELEASE_BLOCKS in effects:
                self._pools[session.claims.data_rank].release(session.owned[::-1])
                self._forget_if_over(session)
            self._changed.notify_all()
        if Effect.REVOKE_TICKET in effects:  # without the lock: it may have to send
            self.receiver.revoke(session.session_id)

    # with the lock held

    def _find(self, session_id: str) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise TransferError(f"no session {session_id!r} is known here, or no longer", code="unknown_session")
        return session

    def _mark_read(self, session: _Session) -> None:
        session.unread = False
        self._leases.end(session)
        self._forget_if_over(session)
        self._changed.notify_all()

    def _give_back(self, session: _Session) -> None:
        """The blocks of a session that has arrived: they were the puller's own, outside of the table."""
        self._pools[session.claims.data_rank].release(session.owned[::-1])
        del self._sessions[session.session_id]
        self._mark_read(session)

    def _forget_if_over(self, session: _Session) -> None:
        over = session.side.state is TargetState.RELEASED and not session.unread
        if over and self._sessions.get(session.session_id) is session:
            del self._sessions[session.session_id]


def _take_memory(layout: KVLayout, num_blocks: int) -> list[SharedMemory]:
    """A segment for each rank: all of them, or none."""
    segments: list[SharedMemory] = []
    with contextlib.ExitStack() as undo:
        for rank in range(layout.world_size):
            segments.append(SharedMemory(memory_bytes(layout, num_blocks, rank)))
            undo.callback(segments[-1].close)
        undo.pop_all()
    return segments


def _is_settled(session: _Session) -> bool:
    """Nobody can write for it any more, and whatever arrived has been pulled."""
    arrived = session.side.state is TargetState.DECODING
    return session.side.state is TargetState.RELEASED or (arrived and not session.unread)
