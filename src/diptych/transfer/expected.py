"""What a ticket's writer has to send, unit by unit, and where each unit belongs in the target's memory."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.core.errors import TransferError
from diptych.core.kv_layout import KVLayout, SequenceKV
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import head_pairs
from diptych.transfer import frames
from diptych.transfer.digest import DIGEST_BYTES
from diptych.transfer.pieces import Units
from diptych.transfer.places import Places, Span, places_of

MAX_KNOWN_UNITS = 1 << 17  # whose places are remembered, whatever a source sends


@dataclass(frozen=True, slots=True)
class Share:
    """What one frame brings: its part of each of a rank's `layers`, where in that each unit ends, and where in a layer
    each of them lies, if that is in one run each."""

    rank: int
    layers: range
    places: Places
    unit_ends: list[int]
    spans: list[Span] | None


class Expected:
    """All units of a ticket, from a source of layout `source` (which must be compatible)."""

    def __init__(self, source: KVLayout, claims: TicketClaims) -> None:
        self._claims = claims
        self._source_block_size = source.block_size
        tokens = range(claims.first_block * claims.layout.block_size, claims.num_tokens)
        self._pairs = head_pairs(source, claims.layout) if tokens else []
        self._units = [Units.of(source, claims.layout, pair, tokens) for pair in self._pairs]
        self._groups = self._units[0].groups if self._units else range(0)
        self._places: dict[int, Places] = {}
        self._parts: dict[tuple[int, int, int], tuple[Places, list[int], list[Span] | None]] = {}
        self._known_units = 0
        self._verified = bytearray(claims.layout.num_layers * len(self._pairs) * len(self._groups))
        self.num_missing = len(self._verified)

    def prepare(self) -> None:
        """Work out where everything belongs now, while the source computes, and not when its first frame is here."""
        for pair in range(len(self._pairs)):
            self._places_of(pair)

    def share(self, frame: frames.Pages) -> Share:
        """Where a frame's units belong. Raises TransferError if they were not asked for."""
        layout = self._claims.layout
        last = frame.layer + frame.num_layers - 1
        if not 0 <= frame.layer <= last < layout.num_layers or layout.stage_of(frame.layer) != layout.stage_of(last):
            raise TransferError(f"layers {frame.layer} to {last} were not asked for in one frame")
        if len(frame.digests) % (DIGEST_BYTES * frame.num_layers):
            raise TransferError(f"{len(frame.digests)} bytes are no whole number of digests for each layer")
        first, end = frame.first_group, frame.first_group + frame.num_groups
        if not (0 <= frame.pair < len(self._pairs) and self._groups.start <= first < end <= self._groups.stop):
            raise TransferError(f"pair {frame.pair}, groups {first} to {end} were not asked for")
        pair, units = self._pairs[frame.pair], self._units[frame.pair]
        rank = layout.rank(self._claims.data_rank, layout.stage_of(last), pair.target_tensor_rank)
        key = (frame.pair, first, end)
        known = self._parts.get(key)  # mostly: all layers are cut alike
        if known is None:
            places = self._places_of(frame.pair).part(units.end(first - 1), units.end(end - 1))
            ends = units.ends(range(first, end))
            known = places, ends, places.spans(ends)
            if self._known_units + len(ends) <= MAX_KNOWN_UNITS:
                self._known_units += len(ends)
                self._parts[key] = known
        return Share(rank, frame.layers, *known)

    def mark(self, frame: frames.Pages) -> bool:
        """These units (which were asked for) are verified. False if some had been before."""
        fresh = 0
        for layer in frame.layers:
            start = (layer * len(self._pairs) + frame.pair) * len(self._groups) + frame.first_group - self._groups.start
            end = start + frame.num_groups
            fresh += self._verified.count(0, start, end)
            self._verified[start:end] = b"\x01" * frame.num_groups
        self.num_missing -= fresh
        return fresh == frame.num_groups * frame.num_layers

    def _places_of(self, pair: int) -> Places:
        """Everything that a pair brings to one layer; the same in all of them. (Two threads may both make it.)"""
        known = self._places.get(pair)
        if known is None:
            claims = self._claims
            kv = SequenceKV(claims.layout, claims.blocks, data_rank=claims.data_rank)
            tokens = self._units[pair].tokens
            known = self._places[pair] = places_of(kv, self._pairs[pair].heads, tokens, self._source_block_size)
        return known
