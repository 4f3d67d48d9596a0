"""What a link knows of the requests whose pages it pushes."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diptych.core.kv_layout import LayerTransfer
from diptych.core.ports import PageSource
from diptych.core.ticket import TicketClaims
from diptych.transfer.pieces import PairPieces


@dataclass(slots=True, eq=False)
class Push:
    """One request's pages on their way. `over` stops everything that is still queued for it."""

    claims: TicketClaims
    go: threading.Event = field(default_factory=threading.Event)
    begun: bool = False
    over: bool = False
    num_frames: int = 0  # to be sent
    num_jobs: int = 0  # queued or under way
    stopping: bool = False  # as soon as there is none


@dataclass(frozen=True, slots=True)
class FrameJob:
    """One frame, of one layer or of several, out of these memories."""

    transfers: Sequence[LayerTransfer]
    pair: int
    pieces: PairPieces
    index: int
    sources: Sequence[PageSource] | Mapping[int, PageSource]
