"""The workers that have registered: connections, manifests, load, and who has fallen silent."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from diptych.core.errors import HandshakeError
from diptych.core.fleet import Epoch, KVEndpoint, Manifest, WorkerId, WorkerState, WorkerStats, WorkerView, is_worker_id
from diptych.policy.compatibility import model_differences
from diptych.policy.resharding import incompatibilities
from diptych.wire import messages
from diptych.wire.channel import Channel

log = logging.getLogger(__name__)

SILENCE_SECONDS = 5.0  # without an answer to what is asked every second a worker counts as lost


@dataclass(slots=True)
class WorkerLink:
    """One registered worker, in one life (epoch).

    Attributes:
        proven: when both directions of the connection were last known to work: at the time of the last ping that has
            been answered. (A connection can fail in one direction only, and messages still come.)
    """

    hello: messages.Hello
    channel: Channel[messages.FromWorker]
    proven: float
    state: WorkerState = WorkerState.READY
    stats: WorkerStats = field(default_factory=WorkerStats)
    turned_away: tuple[tuple[str, int], ...] = ()
    _pings: int = 0
    _pinged: float | None = None  # when the ping was sent that is not answered yet

    @property
    def worker_id(self) -> WorkerId:
        return self.hello.worker_id

    @property
    def manifest(self) -> Manifest:
        return self.hello.manifest

    def endpoint(self, transport: str) -> KVEndpoint | None:
        """Where pages for this worker go, by that transport."""
        return next((end for end in self.manifest.endpoints if end.transport == transport), None)

    def ping(self, now: float) -> None:
        """Ask for a sign of life, unless that has been done in vain so far."""
        if self._pinged is None:
            self._pings += 1
            self._pinged = now
            self.channel.send(messages.Ping(self._pings))

    def on_heartbeat(self, heartbeat: messages.Heartbeat) -> None:
        """It reports its load, and the last ping that it has got."""
        self.stats, self.turned_away = heartbeat.stats, heartbeat.turned_away
        if self._pinged is not None and heartbeat.ping == self._pings:
            self.proven, self._pinged = max(self.proven, self._pinged), None

    def view(self) -> WorkerView:
        """A snapshot for policy and `/fleet`."""
        layout = self.manifest.layout
        return WorkerView(
            worker_id=self.worker_id,
            role=self.hello.role,
            state=self.state,
            epoch=self.hello.epoch,
            pid=self.hello.pid,
            cut=layout.cut,
            num_blocks=self.manifest.num_blocks,
            block_size=layout.block_size,
            token_bytes=layout.token_bytes,
            transports=tuple(end.transport for end in self.manifest.endpoints),
            host=self.manifest.host,
            stats=self.stats,
            turned_away=self.turned_away,
        )


class FleetRegistry:
    """All links by worker. The first worker to register says what this fleet serves. The others serve the same,
    cut into ranks and blocks as they like: KV can pass between any two of them."""

    def __init__(self) -> None:
        self.links: dict[WorkerId, WorkerLink] = {}
        self.manifest: Manifest | None = None
        self._last_epoch: Epoch = 0  # that was given to a worker from elsewhere

    def next_epoch(self, above: Epoch) -> Epoch:
        """For a new life of a worker from elsewhere. One counter serves all of them: so it is above all lives
        that this router has seen of anybody, and nothing need be kept about workers that are gone."""
        self._last_epoch = max(self._last_epoch, above) + 1
        return self._last_epoch

    def admit(self, hello: messages.Hello) -> WorkerLink | None:
        """Check a newcomer. Raises HandshakeError, saying what does not fit, to refuse it.

        Returns the link of an older life of the same worker, which is over now (fencing)."""
        if hello.wire_version != messages.WIRE_VERSION:
            raise HandshakeError(f"wire version {hello.wire_version}, this router speaks {messages.WIRE_VERSION}")
        if not is_worker_id(hello.worker_id):
            raise HandshakeError(f"{hello.worker_id!r} cannot be the name of a worker")
        older = self.links.get(hello.worker_id)
        if older is not None and older.hello.epoch >= hello.epoch:
            raise HandshakeError(f"worker {hello.worker_id} is registered with epoch {older.hello.epoch} already")
        self._check_compatible(hello.manifest)
        return older

    def _check_compatible(self, manifest: Manifest) -> None:
        if self.manifest is None:
            self.manifest = manifest
            return
        ours = self.manifest
        reasons = model_differences(manifest.model, ours.model) + incompatibilities(manifest.layout, ours.layout)
        if reasons:
            raise HandshakeError(f"it does not fit this fleet: {'; '.join(reasons)}")

    def add(self, link: WorkerLink) -> None:
        self.links[link.worker_id] = link

    def has(self, link: WorkerLink) -> bool:
        """Whether this life of the worker is the present one."""
        return self.links.get(link.worker_id) is link

    def remove(self, link: WorkerLink) -> bool:
        """Drop a link. False if a newer life of the worker has taken its place (or it is gone)."""
        if not self.has(link):
            return False
        del self.links[link.worker_id]
        return True

    def draining(self) -> list[WorkerLink]:
        """Workers that want to leave."""
        return [link for link in self.links.values() if link.state is WorkerState.DRAINING]

    def excuse(self, now: float) -> None:
        """Nobody's silence so far counts."""
        for link in self.links.values():
            link.proven = now

    def silent(self, now: float) -> list[WorkerLink]:
        """Workers that have not answered for too long."""
        return [link for link in self.links.values() if now - link.proven > SILENCE_SECONDS]
