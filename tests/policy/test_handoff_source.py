"""What leaves a prefill worker: exactly what the target lacks, cut where blocks end on both sides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core import actions as do
from diptych.core import events as on
from diptych.core.blocks import blocks_for
from diptych.core.kv_layout import KVLayout
from diptych.core.request import Request, SampledToken, SamplingParams
from diptych.core.ticket import TicketClaims
from diptych.engine.scripted import ScriptedModel
from diptych.policy.batching import BatchLimits
from diptych.policy.block_pool import BlockPool
from diptych.policy.worker import WorkerPolicy

LAYOUT = ScriptedModel().layout


def request_of(num_tokens: int, name: str = "r") -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=3)
    return Request(request_id=name, prompt_token_ids=tuple(range(1, num_tokens + 1)), sampling=sampling)


def claims_for(request: Request, layout: KVLayout, first_block: int = 0, data_rank: int = 0) -> TicketClaims:
    num_tokens = len(request.prompt_token_ids)
    return TicketClaims(
        request_id=request.request_id,
        worker_id="d0",
        epoch=1,
        blocks=tuple(range(blocks_for(num_tokens, layout.block_size))),
        first_block=first_block,
        num_tokens=num_tokens,
        layout=layout,
        data_rank=data_rank,
        model_digest="m",
        salt="",
        nonce=b"n" * 16,
    )


def policy_of(block_size: int, chunk: int) -> WorkerPolicy:
    limits = BatchLimits(max_batch_tokens=chunk, max_sequences=1)
    return WorkerPolicy(replace(LAYOUT, block_size=block_size), BlockPool(300, block_size), limits, (0,))


def test_who_is_sent_is_not_preempted() -> None:
    policy = policy_of(16, 64)
    request = request_of(20)
    policy.handle(on.PrefillRequested(request, claims_for(request, LAYOUT)), now=0.0)
    [sequence] = policy.scheduler.running
    assert sequence.pinned


def pieces(policy: WorkerPolicy, event: on.WorkerEvent) -> list[range]:
    """The tokens of each push until the hand-off is closed."""
    found: list[range] = []
    actions = policy.handle(event, now=0.0)
    while not any(isinstance(action, do.CloseHandoff) for action in actions):
        pushes: list[do.PushPages] = []
        samples: tuple[SampledToken | None, ...] = ()
        for action in actions:
            if isinstance(action, do.PushPages):
                pushes.append(action)
            if isinstance(action, do.RunStep):
                pushes += action.pushes
                samples = tuple(SampledToken(50) if row.samples else None for row in action.batch.rows)
        found += [range(push.plan.first_token, push.plan.first_token + push.plan.num_tokens) for push in pushes]
        actions = policy.handle(on.StepFinished(samples, seconds=0.1), now=0.0)
    return found


@given(
    ours=st.integers(1, 9),
    theirs=st.integers(1, 9),
    num_tokens=st.integers(1, 120),
    chunk=st.integers(2, 50),
    data=st.data(),
)
def test_pieces_are_exactly_what_the_target_lacks(
    ours: int, theirs: int, num_tokens: int, chunk: int, data: st.DataObject
) -> None:
    policy = policy_of(ours, chunk)
    target = replace(LAYOUT, block_size=theirs)
    if data.draw(st.booleans(), "the source has a prefix of it"):
        pieces(
            policy, on.PrefillRequested(request_of(num_tokens, "0"), claims_for(request_of(num_tokens, "0"), target))
        )
        policy.handle(on.PushAccepted("0"), now=0.0)
    request = request_of(num_tokens)
    first_block = data.draw(st.integers(0, (num_tokens - 1) // theirs))
    found = pieces(policy, on.PrefillRequested(request, claims_for(request, target, first_block)))
    assert [token for piece in found for token in piece] == list(range(first_block * theirs, num_tokens))
    assert all(found)
    assert all(piece.stop % math.lcm(ours, theirs) == 0 for piece in found[:-1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layout": replace(LAYOUT, num_layers=3)}, "num_layers is 2 on one side and 3 on the other"),
        ({"request_id": "other"}, "another request"),
        ({"num_tokens": 39, "blocks": (0, 1, 2)}, "another request"),
        ({"blocks": (0, 1)}, "2 blocks, from 0 on, for 40 tokens"),
        ({"first_block": 3}, "3 blocks, from 3 on, for 40 tokens"),
        ({"first_block": -1}, "3 blocks, from -1 on, for 40 tokens"),
        ({"data_rank": 1}, "data-parallel rank 1 of 1"),
    ],
)
def test_a_ticket_that_does_not_fit_is_refused(changes: dict[str, Any], reason: str) -> None:
    policy, request = policy_of(16, 64), request_of(40)
    event = on.PrefillRequested(request, replace(claims_for(request, LAYOUT), **changes))
    [failure] = policy.handle(event, now=0.0)
    assert isinstance(failure, do.SendFailure)
    assert failure.code == "ticket_refused"
    assert reason in failure.message
    assert policy.idle


def test_any_cut_of_the_same_model_will_do() -> None:
    policy, request = policy_of(16, 64), request_of(40)
    layout = replace(LAYOUT, block_size=32, tensor_parallel=2, data_parallel=2, expert_parallel=4)
    assert pieces(policy, on.PrefillRequested(request, claims_for(request, layout, data_rank=1))) == [range(40)]
