from __future__ import annotations

import pytest

from diptych.core.request import FinishReason, Request, SamplingParams
from diptych.core.sequence import Sequence
from diptych.policy.stopping import finish_reason

EOS = (2, 3)


@pytest.mark.parametrize(
    ("outputs", "sampling", "finish"),
    [
        ((), SamplingParams(max_tokens=0), None),
        ((9,), SamplingParams(max_tokens=2), None),
        ((9, 9), SamplingParams(max_tokens=2), FinishReason.LENGTH),
        ((2,), SamplingParams(max_tokens=9), FinishReason.STOP),
        ((9, 3), SamplingParams(max_tokens=9), FinishReason.STOP),
        ((3, 9), SamplingParams(max_tokens=9), None),
        ((9, 2), SamplingParams(max_tokens=2), FinishReason.STOP),
        ((2,), SamplingParams(max_tokens=9, ignore_eos=True), None),
        ((7,), SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=(7,)), FinishReason.STOP),
        ((2,), SamplingParams(max_tokens=9, min_tokens=2), None),
        ((7,), SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=(7,)), None),
        ((9, 2), SamplingParams(max_tokens=9, min_tokens=2), FinishReason.STOP),
        ((2,), SamplingParams(max_tokens=1, min_tokens=1, ignore_eos=True), FinishReason.LENGTH),
    ],
)
def test_newest_token_decides(outputs: tuple[int, ...], sampling: SamplingParams, finish: FinishReason | None) -> None:
    request = Request(request_id="r", prompt_token_ids=(2, 7), sampling=sampling)
    assert finish_reason(Sequence.from_log(request, outputs), EOS) is finish
