"""Latency under open-loop load: Poisson arrivals of prompts of one length, against one server after the other."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from diptych.bench.checkpoint import VOCAB_SIZE
from diptych.bench.load import LoadClient, LoadRequest, completion_request, outcome_of
from diptych.bench.metrics import Fields, poisson_arrivals, random_prompts, summarize
from diptych.bench.server import ServerError, System, diptych_server

SPLIT = System("split: 1 prefill + 1 decode", ("--prefill", "1", "--decode", "1"))
UNSPLIT_PAIR = System("un-split: 2 mixed", ("--mixed", "2"))
SERVED_NAME = "bench"
NUM_WARM_UPS = 4
WARM_UP_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """`request_rate` per second for `num_prompts` requests of `input_len` and `output_len` tokens."""

    request_rate: float
    num_prompts: int
    input_len: int = 1024
    output_len: int = 64
    vocab_size: int = VOCAB_SIZE
    seed: int = 1


async def measure_serving(model: Path, system: System, plan: LoadPlan) -> Fields:
    """Start `system`, warm it up, offer it the load of `plan`. Raises ServerError."""
    with diptych_server(model, system, SERVED_NAME) as server:
        async with LoadClient(server.url) as client:
            await warm_up(client, plan)
            arrivals = poisson_arrivals(plan.request_rate, plan.num_prompts, plan.seed)
            requests = make_requests(plan)
            cpu_before = time.process_time()
            exchanges = await client.offer(requests, arrivals)
            client_cpu = time.process_time() - cpu_before
    figures = summarize([outcome_of(exchange) for exchange in exchanges])
    return {
        "system": system.name,
        "flags": " ".join(system.flags),
        **asdict(plan),
        **figures,
        "client_cpu_percent": round(100 * client_cpu / figures["duration"], 2),
    }


def make_requests(plan: LoadPlan) -> list[LoadRequest]:
    """Unique random prompts, so that the prefix cache is of no help."""
    prompts = random_prompts(plan.num_prompts, plan.input_len, plan.vocab_size, plan.seed)
    return [completion_request(SERVED_NAME, prompt, plan.output_len) for prompt in prompts]


async def warm_up(client: LoadClient, plan: LoadPlan) -> None:
    """Make every worker do everything once, with other prompts than those of `plan`.

    Raises:
        ServerError: even that fails.
    """
    for exchange in await client.send_all(make_requests(replace(plan, num_prompts=NUM_WARM_UPS, seed=WARM_UP_SEED))):
        failure = outcome_of(exchange).failure
        if failure is not None:
            raise ServerError(f"a warm-up request failed: {failure}")
