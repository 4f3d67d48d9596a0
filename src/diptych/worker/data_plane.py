"""A worker's KV memory and its links to other workers' memory, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from diptych.chaos.detour import detour
from diptych.core.errors import ConfigError
from diptych.core.events import WorkerEvent
from diptych.core.fleet import Epoch, KVEndpoint, WorkerId
from diptych.core.kv_layout import KVLayout, KVMemory, TransferPlan
from diptych.core.ports import Engine
from diptych.core.request import SampledToken
from diptych.core.settings import WorkerSettings
from diptych.core.ticket import TicketClaims
from diptych.transfer import nixl
from diptych.transfer.memory import SharedMemory
from diptych.transfer.receiver import KVReceiver, Target
from diptych.transfer.sender import Identity, PushLink
from diptych.wire.address import TcpAddress


@dataclass(frozen=True, slots=True)
class SharedKV:
    """The KV memory of an engine's ranks, in order, in segments that other processes can map. It lasts as long as
    the process, since the engine and its tensors hold views into it."""

    memories: tuple[KVMemory, ...]
    segments: tuple[SharedMemory, ...]

    @property
    def layout(self) -> KVLayout:
        return self.memories[0].layout

    @property
    def blocks_per_rank(self) -> int:
        """Blocks of each data-parallel rank (its other ranks hold shares of the same ones)."""
        return self.memories[0].num_blocks

    @property
    def num_blocks(self) -> int:
        """Blocks of all data-parallel ranks together."""
        return self.blocks_per_rank * self.layout.data_parallel


def share_kv(engine: Engine, num_blocks: int) -> SharedKV:
    """Take `num_blocks` blocks for each rank of an engine."""
    segments: list[SharedMemory] = []

    def allocate(nbytes: int) -> SharedMemory:
        segments.append(SharedMemory(nbytes))
        return segments[-1]

    memories = engine.allocate_kv(num_blocks, allocate)
    return SharedKV(memories, tuple(segments))


def _address(transport: str, settings: WorkerSettings) -> str:
    """Where to listen for data connections of one transport."""
    match transport:
        case "shm":
            return f"unix:{settings.run_dir}/{settings.worker_id}-{settings.epoch}-kv.sock"
        case "tcp" | "nixl" | "fastest":
            return str(TcpAddress(settings.data_host or "127.0.0.1", 0, tls=settings.tls))
        case other:
            raise ConfigError(f"--transport {other}: one of auto, shm, tcp, nixl, fastest")


def _offers_nixl(settings: WorkerSettings) -> bool:
    """Whether sources may write with NIXL. Raises ConfigError if they should, but there is no NIXL, or it must not
    be used here."""
    if not nixl.TRANSPORTS.intersection(settings.transports):
        return False
    if settings.tls:
        raise ConfigError("--transport nixl does not go with --tls: NIXL neither encrypts nor authenticates")
    nixl.load()
    if settings.data_host in (None, "127.0.0.1", "::1"):
        nixl.stay_on_this_host()
    return True


class DataPlane:
    """Takes pages in (`KVReceiver`) and pushes pages out (a `PushLink` for each target)."""

    def __init__(
        self,
        settings: WorkerSettings,
        kv: SharedKV,
        model_digest: str,
        post: Callable[[WorkerEvent], None],
    ) -> None:
        self._kv = kv
        self._post = post
        self._closed = False
        self._num_streams = settings.num_streams
        self._identity = Identity(key=settings.key, worker_id=settings.worker_id, model_digest=model_digest)
        target = Target(
            key=settings.key,
            epoch=settings.epoch,
            memories=kv.memories,
            model_digest=model_digest,
            descriptors=tuple(segment.descriptor for segment in kv.segments),
            nixl=_offers_nixl(settings),
        )
        self._receiver = KVReceiver(target, self._report)
        self._revocations = ThreadPoolExecutor(1, "revocations")
        self._links: dict[WorkerId, tuple[Epoch, PushLink]] = {}
        self._ending: list[PushLink] = []  # that others have taken the place of
        # KV in device memory is out of reach of these transports: such a worker serves un-split.
        transports = settings.transports if settings.engine.device == "cpu" else ()
        self.endpoints = tuple(
            KVEndpoint(transport=transport, address=detour(self._receiver.listen(_address(transport, settings))))
            for transport in transports
        )

    def _report(self, event: WorkerEvent) -> None:
        """On the threads of links and receiver. After the end nobody listens any more."""
        if not self._closed:
            self._post(event)

    def count(self, reason: str) -> None:
        """Something was turned away before it came here."""
        self._receiver.book.count(reason)

    @property
    def turned_away(self) -> tuple[tuple[str, int], ...]:
        """What was no good, by reason, and how often."""
        return self._receiver.book.turned_away()

    # as target

    def expect(self, claims: TicketClaims) -> None:
        self._receiver.expect(claims)

    def revoke(self, request_id: str) -> None:
        """Accept nothing more for this request. Never blocks, as telling a source that does not read may."""
        if not self._closed:
            revoked = self._revocations.submit(self._receiver.revoke, request_id)
            revoked.add_done_callback(Future.result)  # what went wrong is logged

    # as source

    def open_link(self, target: WorkerId, epoch: Epoch, endpoint: KVEndpoint) -> None:
        """Have a link to this life of a worker, or a later one: the one there is, or a new one. Never blocks."""
        known_epoch, link = self._links.get(target, (0, None))
        if link is not None and (known_epoch > epoch or (known_epoch == epoch and not link.lost)):
            return
        if link is not None:
            link.hang_up()
            self._ending = [*(old for old in self._ending if not old.ended), link]
        new = PushLink(target, endpoint, self._identity, self._kv.memories, self._report, num_streams=self._num_streams)
        self._links[target] = (epoch, new)

    def push(self, request_id: str, claims: TicketClaims, plan: TransferPlan, layers: Sequence[int]) -> None:
        self._link(claims).push(request_id, claims, plan, layers)

    def close_handoff(self, request_id: str, claims: TicketClaims, token: SampledToken) -> None:
        self._link(claims).close_handoff(request_id, claims, token)

    def abandon(self, request_id: str, claims: TicketClaims) -> None:
        self._link(claims).abandon(request_id, claims)

    def _link(self, claims: TicketClaims) -> PushLink:
        """The link on which this ticket's push began, or is to begin."""
        began = (link for link in self._ending if link.carries(claims))
        return next(began, self._links[claims.worker_id][1])

    def close(self) -> bool:
        """End all links and stop taking pages in. False if somebody might still write to the KV memory."""
        self._closed = True
        links = [*self._ending, *(link for _, link in self._links.values())]
        for link in links:
            link.hang_up()
        for link in links:
            link.end()
        quiet = self._receiver.close()
        self._revocations.shutdown()
        return quiet
