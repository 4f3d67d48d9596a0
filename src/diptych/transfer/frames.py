"""What is said on a data connection between a source (prefill) and a target (decode).

    source                                     target
      PushHello                        →
                                       ←       PushWelcome (+ a descriptor of its KV memory, over a Unix socket)
      Begin        ticket's nonce      →
                                       ←       Go                  only now may the source write
      Pages        one layer, + bytes  →                           (bytes are in place already with mapped memory)
      ...
      Close        first token         →
                                       ←       Accepted            every page verified and committed
                                       ←       Rejected            something is wrong with this request
                                       ←       Cancel              the target does not want it any more
      Stopped                          →                           the source will not write for it again

`Begin` and `Go` are what makes it safe to take a block back: a ticket that nobody has begun can be
revoked at once, and one that somebody has begun is in quarantine until `Stopped` or the connection's end.
"""

from __future__ import annotations

from diptych.core.fleet import Epoch, WorkerId
from diptych.core.request import SampledToken
from diptych.transfer.digest import DIGEST_BYTES
from diptych.wire.messages import Message


class PushHello(Message, frozen=True):
    wire_version: int
    worker_id: WorkerId
    layout_digest: str
    model_digest: str


class PushWelcome(Message, frozen=True):
    num_blocks: int


class Begin(Message, frozen=True):
    request_id: str
    nonce: bytes
    epoch: Epoch


class Go(Message, frozen=True):
    request_id: str
    nonce: bytes


class Pages(Message, frozen=True):
    """Consecutive logical blocks of one layer, from `first_block` on: as many as there are digests, each of
    them DIGEST_BYTES long. `nbytes` of payload follow (0 if they were written to mapped memory)."""

    request_id: str
    nonce: bytes
    epoch: Epoch
    layer: int
    first_block: int
    digests: bytes
    nbytes: int

    @property
    def num_blocks(self) -> int:
        return len(self.digests) // DIGEST_BYTES


class Close(Message, frozen=True):
    """All pages have been sent; decode goes on from this token. `payload` is whatever else the source
    wants to say (public sessions; workers leave it empty)."""

    request_id: str
    nonce: bytes
    epoch: Epoch
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


FromSource = PushHello | Begin | Pages | Close | Stopped
FromTarget = PushWelcome | Go | Accepted | Rejected | Cancel
