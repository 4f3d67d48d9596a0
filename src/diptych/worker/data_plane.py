"""A worker's KV memory and its links to other workers' memory, in both directions."""

from __future__ import annotations

from collections.abc import Callable

from diptych.chaos.detour import detour
from diptych.core.errors import ConfigError
from diptych.core.events import WorkerEvent
from diptych.core.fleet import Epoch, KVEndpoint, WorkerId
from diptych.core.kv_layout import KVMemory, TransferPlan
from diptych.core.ports import Engine
from diptych.core.request import SampledToken
from diptych.core.settings import WorkerSettings
from diptych.core.ticket import TicketClaims
from diptych.transfer.memory import SharedMemory
from diptych.transfer.receiver import KVReceiver, Target
from diptych.transfer.sender import Identity, PushLink
from diptych.wire.address import TcpAddress


def share_kv(engine: Engine, num_blocks: int) -> tuple[KVMemory, SharedMemory]:
    """KV memory for an engine, in a segment that other processes can map. It lasts as long as the process,
    since the engine and its tensors hold views into it."""
    segments: list[SharedMemory] = []

    def allocate(nbytes: int) -> SharedMemory:
        segments.append(SharedMemory(nbytes))
        return segments[-1]

    [memory] = engine.allocate_kv(num_blocks, allocate)
    return memory, segments[0]


def _address(transport: str, settings: WorkerSettings) -> str:
    """Where to listen for data connections of one transport."""
    match transport:
        case "shm":
            return f"unix:{settings.run_dir}/{settings.worker_id}-{settings.epoch}-kv.sock"
        case "tcp":
            return str(TcpAddress(settings.data_host or "127.0.0.1", 0, tls=settings.tls))
        case other:
            raise ConfigError(f"--transport {other}: one of auto, shm, tcp")


class DataPlane:
    """Takes pages in (`KVReceiver`) and pushes pages out (a `PushLink` for each target)."""

    def __init__(
        self,
        settings: WorkerSettings,
        memory: KVMemory,
        segment: SharedMemory,
        model_digest: str,
        post: Callable[[WorkerEvent], None],
    ) -> None:
        self._memory = memory
        self._post = post
        self._closed = False
        self._identity = Identity(key=settings.key, worker_id=settings.worker_id, model_digest=model_digest)
        target = Target(
            key=settings.key,
            epoch=settings.epoch,
            memory=memory,
            model_digest=model_digest,
            descriptor=segment.descriptor,
        )
        self._receiver = KVReceiver(target, self._report)
        self._links: dict[WorkerId, tuple[Epoch, PushLink]] = {}
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

    # as target

    def expect(self, claims: TicketClaims) -> None:
        self._receiver.expect(claims)

    def revoke(self, request_id: str) -> None:
        self._receiver.revoke(request_id)

    # as source

    def open_link(self, target: WorkerId, epoch: Epoch, endpoint: KVEndpoint) -> None:
        """Have a link to this life of a worker: the one there is, or a new one."""
        known_epoch, link = self._links.get(target, (0, None))
        if link is not None and known_epoch == epoch and not link.lost:
            return
        if link is not None:
            link.end()
        self._links[target] = (epoch, PushLink(target, endpoint, self._identity, self._memory, self._report))

    def push(self, request_id: str, claims: TicketClaims, plan: TransferPlan, layer: int) -> None:
        self._link(claims).push(request_id, claims, plan, layer)

    def close_handoff(self, request_id: str, claims: TicketClaims, token: SampledToken) -> None:
        self._link(claims).close_handoff(request_id, claims, token)

    def abandon(self, request_id: str, claims: TicketClaims) -> None:
        self._link(claims).abandon(request_id, claims)

    def _link(self, claims: TicketClaims) -> PushLink:
        return self._links[claims.worker_id][1]

    def close(self) -> None:
        """End all links and stop taking pages in."""
        self._closed = True
        for _, link in self._links.values():
            link.end()
        self._receiver.close()
