"""Rows that nobody wants any more leave a running step between two layers."""

from __future__ import annotations

from diptych.core.ports import Unwanted
from diptych.core.sequence import Batch
from diptych.engine.torch_engine.attention import PagedAttention
from diptych.engine.torch_engine.model import Narrowed


class NothingLeft(Exception):
    """Nobody wants any row of this step: there is nothing more to compute."""


class Narrowing:
    """Narrows one step. Prefill chunks leave one by one. A decode is one token among many that attend together: it
    stays, unless it is among the last that are left."""

    def __init__(self, batch: Batch, attention: PagedAttention, unwanted: Unwanted) -> None:
        self._rows = {row.sequence.request_id: index for index, row in enumerate(batch.rows)}
        self._attention = attention
        self._unwanted = unwanted
        self._staying: set[str] = set()  # though unwanted

    def __call__(self) -> Narrowed | None:
        """Leave out what has become unwanted; None if that is nothing. Raises NothingLeft."""
        unwanted = self._unwanted.take() & self._rows.keys()
        if not unwanted:
            return None
        self._staying |= unwanted
        if len(self._staying) == len(self._rows):
            self._unwanted.let_go(self._staying)
            raise NothingLeft
        chunks = {chunk.row for chunk in self._attention.plan.prefills}
        leaving = {request_id for request_id in self._staying if self._rows[request_id] in chunks}
        if not leaving:
            return None
        plan, tokens = self._attention.plan.without([self._rows.pop(request_id) for request_id in leaving])
        self._staying -= leaving
        self._attention.plan = plan
        self._unwanted.let_go(leaving)
        return Narrowed(tokens, plan.positions, plan.outputs)
