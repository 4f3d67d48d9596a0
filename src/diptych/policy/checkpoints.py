"""Copies of running streams' KV, so that a stream whose worker dies goes on from the last copy.

Off unless a request asks for it (`Request.checkpoint_tokens`). A checkpoint is a shadow attempt at the log so far,
split between the worker that decodes the stream, whose prefix cache has every full block of it, and a buddy, whose
prefix cache keeps what it receives. Blocks that the buddy has already are not sent again, so a copy costs what is new
since the one before it. Workers need to know nothing of all this, and placement neither: a stream is continued where
that takes the fewest seconds, which is where the copy is.

It is best effort: where a copy would have to wait, or takes more than its share of what is free, it is left out.
"""

from __future__ import annotations

from diptych.core.actions import RouterAction
from diptych.core.blocks import blocks_for
from diptych.core.fleet import WorkerState, WorkerView
from diptych.core.request import Request, SamplingParams
from diptych.core.timeline import Timeline
from diptych.policy.attempts import Attempts
from diptych.policy.live_request import Checkpoint, LiveRequest
from diptych.policy.placement import Place, Placement

SHARE = 0.5  # of a worker's free blocks, which a copy may take
TICKET_SECONDS = 1.0  # a copy that has no ticket by then is in the way of the streams that queue up behind it

_TWO_TOKENS = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
"""The first one comes from the source, so only the second one shows that the KV has arrived."""


class Checkpoints:
    """Starts copies, one at a time for each stream, and remembers who has them.

    Attributes:
        taken: copies that have arrived.
        tokens: whose KV was sent for them.
    """

    def __init__(self, attempts: Attempts, placement: Placement) -> None:
        self._attempts = attempts
        self._placement = placement
        self.taken = self.tokens = 0

    def keep(self, stream: LiveRequest, now: float) -> list[RouterAction]:
        """Begin with the next copy, if it is due and there is room. To be called after each of a stream's tokens."""
        every, backup = stream.request.checkpoint_tokens, stream.backup
        if not every or not stream.decodes or stream.route is None or backup.copy is not None:
            return []
        if backup.attempt != stream.attempt or (backup.buddy is not None and backup.buddy not in stream.kv_at):
            backup.attempt, backup.buddy, backup.due = stream.attempt, None, 0  # it is elsewhere, or the copy is lost
        if stream.num_tokens < max(every, backup.due):
            return []
        backup.due = stream.num_tokens + every
        source = self._placement.workers.get(stream.route.decode)
        place = None if source is None else self._place(stream, source)
        if source is None or place is None:
            return []
        backup.copy = _copy_of(stream, source.block_size, now)
        return [self._attempts.begin(backup.copy, place, now)]

    def ended(self, copy: LiveRequest, stream: LiveRequest, *, ok: bool) -> None:
        """The buddy has its copy, or will not get it."""
        buddy = None if copy.route is None else copy.route.decode
        stream.backup.copy, stream.backup.buddy = None, buddy if ok else None
        if ok and buddy is not None:
            num_tokens = len(copy.request.prompt_token_ids)
            self.taken += 1
            self.tokens += num_tokens - copy.kv_at.get(buddy, 0)
            stream.kv_at[buddy] = num_tokens

    def _place(self, stream: LiveRequest, source: WorkerView) -> Place | None:
        """From the source to the buddy, or to a new one if it cannot be used; None if this is not the time."""
        buddy, busy = stream.backup.buddy, source.stats.waiting > 0 or source.blocks_free <= source.stats.running
        if busy or self._attempts.waiting or source.state is not WorkerState.READY:
            return None
        candidates = {worker.worker_id for worker in self._attempts.trusted() if _has_room(worker, stream.num_tokens)}
        if buddy in candidates:
            candidates = {buddy}
        return self._attempts.onward(stream, source, avoid=self._placement.workers.keys() - candidates)


def _has_room(worker: WorkerView, num_tokens: int) -> bool:
    return not worker.stats.waiting and blocks_for(num_tokens, worker.block_size) <= SHARE * worker.blocks_free


def _copy_of(stream: LiveRequest, block_size: int, now: float) -> LiveRequest:
    """Of the full blocks that the source has computed. One token after them is left for the source to compute."""
    log = stream.log[: (stream.num_tokens - 1) // block_size * block_size + 1]
    request = Request(
        request_id=f"checkpoint~{stream.attempt_id}~{stream.num_tokens}",
        prompt_token_ids=log,
        sampling=_TWO_TOKENS,
        cache_salt=stream.request.cache_salt,
        tenant=stream.request.tenant,
    )
    return LiveRequest(request, Timeline(arrived=now), now, shadow=Checkpoint(stream))
