"""What a worker's leader and its rank processes tell each other, over a socket pair."""

from __future__ import annotations

import msgspec

from diptych.core.blocks import BlockId
from diptych.core.request import Request, SampledToken
from diptych.core.settings import EngineSettings

MAX_MESSAGE_BYTES = 64 << 20  # whole prompts travel in one


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages: the class name is the tag."""


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One share of a step, and what is new about its sequence: `tokens` of the log, after those already known
    (for a new sequence: after the prompt of `request`), and `blocks` of its table, after the first `kept_blocks`."""

    request_id: str
    request: Request | None  # of a sequence that is new to the rank, or new under this id
    tokens: list[int]
    kept_blocks: int
    blocks: list[BlockId]
    start: int
    num_tokens: int
    samples: bool


# to a rank


class Start(Message, frozen=True):
    """The first message. `cores` to be pinned to, if any; `rendezvous` is where ranks meet each other."""

    rank: int
    settings: EngineSettings
    cores: list[int]
    rendezvous: str


class TakeKV(Message, frozen=True):
    """KV memory of `nbytes` bytes. Its descriptor follows."""

    num_blocks: int
    nbytes: int


class Step(Message, frozen=True):
    """The rows of the rank's data-parallel rank, maybe none: every rank takes part in every step."""

    rows: list[Row]
    reports_layers: bool


class Forget(Message, frozen=True):
    request_id: str


# from a rank


class Loading(Message, frozen=True):
    done: int
    total: int


class Ready(Message, frozen=True):
    """The model is loaded, and all ranks have met. `digest` of the model, from rank 0 only."""

    digest: str | None


class KVTaken(Message, frozen=True):
    """The answer to TakeKV."""


class LayerDone(Message, frozen=True):
    """KV of a layer, by its number in the model, is written for all rows that the rank was given."""

    layer: int


class StepDone(Message, frozen=True):
    """One entry per row where the rank chooses tokens; nothing from the others."""

    samples: list[SampledToken | None]


class StepCorrupt(Message, frozen=True):
    """All is computed, but the logits of these requests are not finite."""

    request_ids: list[str]


class Failed(Message, frozen=True):
    """The rank's last word. `code` as in `core.errors`."""

    code: str
    message: str


ToRank = Start | TakeKV | Step | Forget
FromRank = Loading | Ready | KVTaken | LayerDone | StepDone | StepCorrupt | Failed
