"""Routing among workers whose blocks differ in size: each one's cache is asked in its own blocks."""

from __future__ import annotations

import pytest

from diptych.core.actions import StartLocal
from diptych.core.blocks import block_hashes
from diptych.core.events import BlocksCached, RequestSubmitted, WorkerUpdated
from diptych.core.fleet import Role, WorkerState, WorkerView
from diptych.core.request import Request
from diptych.policy.dispatch import RouterPolicy
from diptych.policy.routing import Routing

PROMPT = tuple(range(1, 1001))


@pytest.mark.parametrize(
    ("cached", "expected"),
    [
        ({"small": 512, "large": 0}, "small"),
        ({"small": 512, "large": 960}, "large"),
        ({"small": 976, "large": 960}, "small"),
    ],
)
def test_the_longest_prefix_wins_whatever_the_block_size(cached: dict[str, int], expected: str) -> None:
    router = RouterPolicy(Routing())
    for name, size in (("small", 16), ("large", 64)):
        view = WorkerView(
            worker_id=name, role=Role.MIXED, state=WorkerState.READY, epoch=1, num_blocks=4096 // size, block_size=size
        )
        router.handle(WorkerUpdated(view), now=0.0)
        stored = tuple(block_hashes(PROMPT[: cached[name]], size))
        router.handle(BlocksCached(name, stored, ()), now=0.0)
    actions = router.handle(RequestSubmitted(Request(request_id="r", prompt_token_ids=PROMPT)), now=0.0)
    assert [action.worker_id for action in actions if isinstance(action, StartLocal)] == [expected]
