"""The prefill side of public sessions. See `transfer.session`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diptych.core.blocks import BlockId, blocks_for
from diptych.core.errors import TicketError, TransferError
from diptych.core.events import LinkLost, PushAccepted, PushCancelled, PushRejected
from diptych.core.fleet import KVEndpoint
from diptych.core.kv_layout import KVLayout, KVMemory, SequenceKV
from diptych.core.request import SampledToken
from diptych.core.ticket import TicketClaims
from diptych.policy.handoff import Effect, SourceEvent, SourceState, source_side
from diptych.policy.resharding import incompatibilities, plan_resharding
from diptych.transfer.arrays import KVPages, as_pages, layers_of
from diptych.transfer.leases import Leases
from diptych.transfer.local import LocalEndpoint
from diptych.transfer.sender import Identity, PushLink
from diptych.transfer.sender import SourceEvent as LinkEvent
from diptych.transfer.session_target import DEFAULT_LEASE_SECONDS, KVTarget
from diptych.wire.address import parse_address
from diptych.wire.key_file import check_key
from diptych.wire.tickets import open_ticket

MAX_PAYLOAD_BYTES = 64 << 10
CLOSING_SECONDS = 5.0  # to tell the targets of open sessions

_Peer = str | KVTarget


class KVSource:
    """Opens sessions towards any number of targets. All methods may be called from any thread.

    `key` is the secret that all sources and targets of one fleet share, `model` what both sides must agree
    on, `name` what targets call this source in their logs. Raises ConfigError if the key is too short to be a secret.
    """

    def __init__(self, *, key: bytes, model: str = "", name: str = "source") -> None:
        check_key(key)
        self._key = key
        self._identity = Identity(key=key, worker_id=name, model_digest=model)
        self._changed = threading.Condition()  # guards what follows, and the sessions' states
        self._links: dict[tuple[_Peer, str], PushLink] = {}
        self._sessions: dict[str, SourceSession] = {}
        self._closed = False
        self._leases: Leases[SourceSession] = Leases(SourceSession._expire)

    def create_session(
        self,
        session_id: str,
        layout: KVLayout,
        ticket: bytes,
        target: str | KVTarget,
        *,
        data_rank: int = 0,
        lease: float = DEFAULT_LEASE_SECONDS,
    ) -> SourceSession:
        """Begin to hand KV of `layout` (on its data-parallel rank `data_rank`) over to whoever made `ticket`
        (`KVTarget.expect`) at address `target`; a target in this process may be given itself. Unless it is
        accepted within `lease` seconds, the session fails.

        Raises TicketError if the ticket is not this fleet's or is for another session or model, ValueError
        if a session of this name is open or if the target's layout cannot be made from this one, and ConfigError if
        `target` is no address, or one that leaves this machine without TLS. That the target cannot be reached
        shows when pushing or waiting.
        """
        if isinstance(target, str):
            parse_address(target)
        claims = open_ticket(ticket, self._key)
        if (claims.request_id, claims.model_digest) != (session_id, self._identity.model_digest):
            raise TicketError(
                f"this ticket is for session {claims.request_id!r} and model {claims.model_digest!r}, "
                f"not for {session_id!r} and {self._identity.model_digest!r}"
            )
        if reasons := incompatibilities(layout, claims.layout):
            raise ValueError(f"the target's KV layout cannot be made from this one: {'; '.join(reasons)}")
        origin = SequenceKV(layout, (), data_rank=data_rank)
        with self._changed:
            if self._closed:
                raise ValueError("this source has been closed")
            if session_id in self._sessions:
                raise ValueError(f"there is a session {session_id!r} already")
            link = self._link(target, layout, claims)
            session = self._sessions[session_id] = SourceSession(self, claims, origin, link)
            self._leases.grant(session, lease)
            link.begin(session_id, claims)
        return session

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until every session is over: its KV is at its target, or will not go there. False if that
        takes longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._sessions, timeout)

    def close(self) -> None:
        """Abort the sessions that are open, and end all connections."""
        with self._changed:
            self._closed = True
            for session in list(self._sessions.values()):
                session.abort()
        self.drain(CLOSING_SECONDS)
        with self._changed:
            links = list(self._links.values())
            self._links.clear()
        for link in links:
            link.end()
        self._leases.close()

    def __enter__(self) -> KVSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _link(self, target: _Peer, layout: KVLayout, claims: TicketClaims) -> PushLink:
        """The connection for KV of this layout to this target: the one there is, or a new one. Lost ones are forgotten,
        whoever they led to: their sessions know them. With the lock held."""
        self._links = {where: link for where, link in self._links.items() if not link.lost}
        link = self._links.get((target, layout.digest))
        if link is None:
            no_pages = [KVMemory(layout, 0, memoryview(b""))]  # sessions bring their own
            link = PushLink(claims.worker_id, _endpoint(target), self._identity, no_pages, self._on)
            self._links[target, layout.digest] = link
        return link

    def _forget(self, session: SourceSession) -> None:
        """A session is over. With the lock held."""
        del self._sessions[session.session_id]
        self._leases.end(session)

    def _on(self, event: LinkEvent) -> None:
        """On the threads of links."""
        if isinstance(event, LinkLost):
            lost = TransferError(f"the data connection to {event.worker_id} is lost")
            for session_id in event.request_ids:
                self._tell(session_id, SourceEvent.LINK_LOST, lost)
        elif isinstance(event, PushAccepted):
            self._tell(event.request_id, SourceEvent.ACCEPTED)
        elif isinstance(event, PushRejected):
            self._tell(event.request_id, SourceEvent.REJECTED, TransferError(event.message, code=event.code))
        elif isinstance(event, PushCancelled):
            cancelled = TransferError("the target does not want this session any more", code="cancelled")
            self._tell(event.request_id, SourceEvent.CANCELLED, cancelled)
        else:
            self._tell(event.request_id, SourceEvent.STOPPED)

    def _tell(self, session_id: str, event: SourceEvent, failure: TransferError | None = None) -> None:
        with self._changed:
            session = self._sessions.get(session_id)
            if session is not None:
                session._follow(event, failure)


class SourceSession:
    """One sequence's KV on its way to one target. Made by `KVSource.create_session`.

    Pages that were pushed are read in the background: they must not change until `wait` is over, one way or
    the other. As a context manager it aborts unless it was closed.
    """

    def __init__(self, source: KVSource, claims: TicketClaims, origin: SequenceKV, link: PushLink) -> None:
        self.session_id = claims.request_id
        self.layout = origin.layout
        self._origin = origin  # its blocks come with each push
        self._source = source
        self._changed = source._changed
        self._claims = claims
        self._link = link
        self._side = source_side()
        self._failure: TransferError | None = None

    @property
    def state(self) -> SourceState:
        """Where the hand-off stands, by the source's table in `policy.handoff`."""
        return self._side.state

    @property
    def missing_tokens(self) -> range:
        """The tokens whose KV the target has not got and waits for."""
        return range(self._claims.first_block * self._claims.layout.block_size, self._claims.num_tokens)

    @property
    def missing(self) -> range:
        """The logical blocks, of this side's block size, that hold these tokens."""
        tokens, size = self.missing_tokens, self.layout.block_size
        return range(tokens.start // size, blocks_for(tokens.stop, size))

    def push(
        self,
        kv: Any,
        target_layout: KVLayout | None = None,
        *,
        layers: Iterable[int] | None = None,
        blocks: Sequence[BlockId] | None = None,
        first_block: int | None = None,
    ) -> None:
        """Send KV: everything at once, or piece by piece, in any order. Returns before it is sent.

        `kv` is any form that `transfer.arrays.as_pages` takes; of a layout that cuts a sequence into several ranks,
        a list of such forms, one for each rank of the session's data-parallel rank (pipeline stage by stage,
        and in each by tensor rank; None for a rank that sends nothing now). Its blocks `blocks` (by default all)
        hold the consecutive logical blocks that begin with `first_block` (by default the first that is missing).
        Of them, `layers` are sent (by default all that `kv` has). `target_layout` is the target's (by default
        what the ticket says). A part that is neither the first nor the last has to begin and end at tokens
        that begin a block on both sides.

        Raises ValueError if that does not fit together or if the session is closed, and TransferError if it
        has failed.
        """
        if target_layout not in (None, self._claims.layout):
            raise ValueError(f"the ticket was granted for another layout than {target_layout}")
        ranks = self._pages(kv)
        here = self._blocks(ranks, blocks)
        first = self.missing.start if first_block is None else first_block
        if first not in self.missing or first + len(here) > self.missing.stop or not here:
            raise ValueError(f"blocks {first} to {first + len(here)} were pushed, {self.missing} are missing")
        there = SequenceKV(self._claims.layout, self._claims.blocks, data_rank=self._claims.data_rank)
        origin = replace(self._origin, blocks=here, first_block=first)
        tokens, missing = origin.tokens, self.missing_tokens
        plan = plan_resharding(origin, there, range(max(tokens.start, missing.start), min(tokens.stop, missing.stop)))
        wanted = self._layers(ranks, layers)
        with self._changed:
            self._check_open()
            self._link.push(self.session_id, self._claims, plan, wanted, ranks)

    def _pages(self, kv: Any) -> dict[int, KVMemory | KVPages]:
        """What was given, by rank."""
        first = self.layout.rank(self._origin.data_rank, 0, 0)
        count = self.layout.pipeline_parallel * self.layout.tensor_parallel
        given = [kv] if count == 1 else list(kv)
        if len(given) != count:
            raise ValueError(f"KV of {len(given)} ranks, the session's layout has {count}")
        return {
            rank: as_pages(part, self.layout, rank) for rank, part in enumerate(given, start=first) if part is not None
        }

    @staticmethod
    def _blocks(ranks: Mapping[int, KVMemory | KVPages], blocks: Sequence[BlockId] | None) -> Sequence[BlockId]:
        sizes = {pages.num_blocks for pages in ranks.values()}
        if len(sizes) != 1:
            raise ValueError(f"the ranks' KV has {sorted(sizes)} blocks")
        [num_blocks] = sizes
        here = range(num_blocks) if blocks is None else blocks
        if not all(0 <= block < num_blocks for block in here):
            raise ValueError(f"KV of {num_blocks} blocks has no blocks {list(here)}")
        return here

    def _layers(self, ranks: Mapping[int, KVMemory | KVPages], layers: Iterable[int] | None) -> list[int]:
        """The layers to send; every rank that holds one of them has to give it."""
        held = {rank: frozenset(layers_of(pages)) for rank, pages in ranks.items()}
        given = frozenset[int]().union(*held.values())
        wanted = given if layers is None else frozenset(layers)
        stages = {self.layout.stage_of(layer) for layer in wanted if 0 <= layer < self.layout.num_layers}
        firsts = [self.layout.rank(self._origin.data_rank, stage, 0) for stage in stages]
        holders = [range(first, first + self.layout.tensor_parallel) for first in firsts]
        complete = [frozenset.intersection(*(held.get(rank, frozenset()) for rank in group)) for group in holders]
        if not wanted <= frozenset[int]().union(*complete):
            raise ValueError(f"layers {sorted(wanted)} of KV that has {sorted(given)}, or not on every rank")
        return sorted(wanted)

    def close(self, token: SampledToken | int, payload: bytes = b"") -> None:
        """Everything has been pushed, and `token` is the first one that follows from it. `payload` (at most
        64 KiB) reaches the puller as it is. Raises as `push` does."""
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"a payload of {len(payload)} bytes, the limit is {MAX_PAYLOAD_BYTES}")
        first = token if isinstance(token, SampledToken) else SampledToken(token)
        with self._changed:
            self._check_open()
            self._follow(SourceEvent.ALL_PUSHED)
            self._link.close_handoff(self.session_id, self._claims, first, payload)

    def wait(self, timeout: float | None = None) -> None:
        """Block until nobody reads the pushed pages any more: returns if the target has them all, verified,
        and raises TransferError if it has not and never will. TimeoutError means that they are still read."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._side.state is SourceState.RELEASED, timeout):
                raise TimeoutError(f"session {self.session_id!r} is {self._side.state} after {timeout} s")
            if self._failure is not None:
                raise self._failure

    def abort(self) -> None:
        """Send nothing more; the target hears of it at once. Harmless when the session is over."""
        self._end(TransferError("the session was aborted by its source", code="aborted"))

    def __enter__(self) -> SourceSession:
        return self

    def __exit__(self, *_: object) -> None:
        if self._side.state is SourceState.PREFILLING:
            self.abort()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._side.state is not SourceState.PREFILLING:
            raise ValueError(f"session {self.session_id!r} has been closed")

    def _expire(self) -> None:
        self._end(TransferError("the session's lease ended before its target had everything", code="lease_expired"))

    def _end(self, failure: TransferError) -> None:
        with self._changed:
            self._follow(SourceEvent.ABORTED, failure)

    def _follow(self, event: SourceEvent, failure: TransferError | None = None) -> None:
        """What the table says, with the lock held."""
        for effect in self._side.on(event):
            if effect is Effect.STOP_WRITING:
                self._failure = failure
                self._link.abandon(self.session_id, self._claims)
            elif effect is Effect.RELEASE_BLOCKS:
                self._source._forget(self)
        self._changed.notify_all()


def _endpoint(target: _Peer) -> KVEndpoint | LocalEndpoint:
    if isinstance(target, KVTarget):
        return LocalEndpoint(target.receiver)
    return KVEndpoint(transport="shm" if target.startswith("unix:") else "tcp", address=target)
