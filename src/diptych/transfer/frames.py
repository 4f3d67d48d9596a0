"""What is said on a data connection between a source (prefill) and a target (decode).

    source                                     target
      PushHello    layout              →
                                       ←       PushWelcome (+ a descriptor of each rank's KV memory, over a Unix socket)
                                       ←       NixlWelcome         if the hello asks for it
      Probe        + bytes             →                           how fast are frames? (before all else, if at all)
                                       ←       Probed
      Begin        ticket's nonce      →
                                       ←       Go                  only now may the source write
      Pages        units, + bytes      →                           (bytes are in place already with mapped memory)
      ...
      Close        first token         →
                                       ←       Accepted            every unit verified and committed
                                       ←       Rejected            something is wrong with this request
                                       ←       Cancel              the target does not want it any more
      Stopped                          →                           the source will not write for it again

A source may open further connections, each with a `Join` that is answered by `Joined` there, and spread its
`Pages` over all of them; the target's other answers come over the first one. So that nothing depends on which
connection is faster, `Close` says how many `Pages` there are for the request, and counts when the target is done
with them. `Stopped` counts when no thread of the target is at work on a frame of the request any more (what comes
later is turned away).

`Begin` and `Go` are what makes it safe to take a block back: a ticket that nobody has begun can be
revoked at once, and one that somebody has begun is in quarantine until `Stopped` or the connection's end.
"""

from __future__ import annotations

from diptych.core.fleet import Epoch, WorkerId
from diptych.core.kv_layout import KVLayout
from diptych.core.request import SampledToken
from diptych.transfer.digest import DIGEST_BYTES
from diptych.wire.messages import Message


class PushHello(Message, frozen=True):
    """The source's layout may be any that the target's can be made from (`policy.resharding`)."""

    wire_version: int
    worker_id: WorkerId
    layout: KVLayout
    model_digest: str
    nixl: bool  # it wants to write with NIXL


class PushWelcome(Message, frozen=True):
    """Each of the layout's ranks has `num_blocks` blocks. `num_descriptors` follow, one for each rank or none."""

    layout: KVLayout
    num_blocks: int
    num_descriptors: int
    link: bytes  # what further connections name in their Join


class NixlWelcome(Message, frozen=True):
    """Where a source may write with NIXL: at the target's agent (`metadata` is NIXL's own, for `add_remote_agent`),
    the memory of each rank, in order, from its address in `bases` on; and `scratch`, of SCRATCH_BYTES, at any time.
    Pages may then be written, or follow in frames, as the source likes."""

    metadata: bytes
    bases: tuple[int, ...]
    scratch: int


class Probe(Message, frozen=True):
    """`nbytes` of payload follow, which mean nothing; at most SCRATCH_BYTES. Answered by Probed."""

    nbytes: int


class Probed(Message, frozen=True):
    pass


class Refused(Message, frozen=True):
    """Instead of a welcome."""

    message: str


class Join(Message, frozen=True):
    """First message of a further connection."""

    link: bytes


class Joined(Message, frozen=True):
    """From now on the link is not over before this connection has ended, too: only now may its thread write."""


class Begin(Message, frozen=True):
    request_id: str
    nonce: bytes
    epoch: Epoch


class Go(Message, frozen=True):
    request_id: str
    nonce: bytes


class Pages(Message, frozen=True):
    """Consecutive units of one pair (`policy.digest_units`, pairs numbered as in `head_pairs`), from group
    `first_group` on, in `num_layers` layers from `layer` on, which lie in one pipeline stage of the target. Their
    digests, each of them DIGEST_BYTES long, come layer after layer, as does the payload: `nbytes` follow, in logical
    order (0 if they were written to mapped memory)."""

    request_id: str
    nonce: bytes
    epoch: Epoch
    layer: int
    num_layers: int
    pair: int
    first_group: int
    digests: bytes
    nbytes: int

    @property
    def layers(self) -> range:
        return range(self.layer, self.layer + self.num_layers)

    @property
    def num_groups(self) -> int:
        """In each layer."""
        return len(self.digests) // DIGEST_BYTES // self.num_layers

    def digests_of(self, layer: int) -> bytes:
        """Those of one of the layers."""
        size = self.num_groups * DIGEST_BYTES
        start = (layer - self.layer) * size
        return self.digests[start : start + size]


class Close(Message, frozen=True):
    """All pages have been sent, or are under way; decode goes on from this token. `payload` is whatever else
    the source wants to say (public sessions; workers leave it empty)."""

    request_id: str
    nonce: bytes
    epoch: Epoch
    num_frames: int
    token: SampledToken
    payload: bytes


class Stopped(Message, frozen=True):
    request_id: str
    nonce: bytes


class Accepted(Message, frozen=True):
    request_id: str
    nonce: bytes


class Rejected(Message, frozen=True):
    request_id: str
    nonce: bytes
    code: str
    message: str


class Cancel(Message, frozen=True):
    request_id: str
    nonce: bytes


SCRATCH_BYTES = 1 << 20

FromSource = PushHello | Join | Probe | Begin | Pages | Close | Stopped
FromTarget = PushWelcome | NixlWelcome | Refused | Probed | Joined | Go | Accepted | Rejected | Cancel
