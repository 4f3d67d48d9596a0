"""The smallest request there is: to see whether a worker, or a pair, can be trusted again."""

from __future__ import annotations

from diptych.core.fleet import WorkerId
from diptych.core.request import Request, SamplingParams
from diptych.core.timeline import Timeline
from diptych.policy.live_request import LiveRequest, Pair, Probe

PROMPT = (0,)


def canary(number: int, target: WorkerId | Pair, now: float) -> LiveRequest:
    """Number `number` of a router's canaries, for a worker or a pair. One token in; one out of a worker, and of a pair
    two: the first comes from the prefill worker, so only the second shows that the KV has arrived."""
    sampling = SamplingParams(temperature=0.0, max_tokens=2 if isinstance(target, tuple) else 1, ignore_eos=True)
    request = Request(request_id=f"canary~{number}", prompt_token_ids=PROMPT, sampling=sampling, cache_salt="~canary")
    return LiveRequest(request, Timeline(arrived=now), now, shadow=Probe(target))
