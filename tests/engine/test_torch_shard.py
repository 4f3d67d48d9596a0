"""How a model is cut: every part of it is somewhere, and cuts that do not come out even are refused."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_harness import checkpoint

from diptych.core.errors import ConfigError
from diptych.core.settings import ParallelSettings
from diptych.engine.torch_engine.checkpoint import Checkpoint, open_checkpoint
from diptych.engine.torch_engine.config import ExpertsConfig
from diptych.engine.torch_engine.shard import Shard

EXPERTS = ExpertsConfig(layers=(0, 1, 2), num_experts=16, per_token=2, intermediate_size=48, normalized=True)


def model(experts: ExpertsConfig | None = EXPERTS, **changes: Any) -> Checkpoint:
    sizes = {"num_layers": 3, "num_heads": 16, "num_kv_heads": 4, "vocab_size": 509, "intermediate_size": 112}
    plain = open_checkpoint(checkpoint("llama"))
    return replace(plain, config=replace(plain.config, **{**sizes, "experts": experts, **changes}))


def shards(served: Checkpoint, **parallel: int) -> list[Shard]:
    layout = served.layout(16, ParallelSettings(**parallel))
    return [Shard(served.config, layout, rank) for rank in range(layout.world_size)]


@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.integers(1, 3),
    data=st.sampled_from([1, 2, 4]),
    spread=st.booleans(),
)
def test_every_part_is_held_as_often_as_it_should_be(tensor: int, pipeline: int, data: int, spread: bool) -> None:
    expert = tensor * data if spread else 1
    if 16 % expert:
        return
    held = shards(model(), tensor=tensor, pipeline=pipeline, data=data, expert=expert)
    queries = Counter((layer, head, s.data_rank) for s in held for layer in s.layers for head in s.query_heads)
    assert queries == Counter((layer, head, rank) for layer in range(3) for head in range(16) for rank in range(data))
    experts = Counter((layer, index) for s in held for layer in s.layers for index in s.experts(EXPERTS))
    copies = 1 if spread else tensor * data
    assert experts == Counter({(layer, index): copies for layer in range(3) for index in range(16)})
    for s in held:
        group = s.config.num_heads // s.config.num_kv_heads
        assert {head // group for head in s.query_heads} == set(s.kv_heads)
        assert s.rank == s.layout.rank(s.data_rank, s.stage, s.tensor_rank)
        assert set(s.experts(EXPERTS)) <= set(s.column_experts(EXPERTS))
        assert s.own_layout.block_bytes == s.layout.block_bytes
    assert [s.samples for s in held].count(True) == data
    tokens = [token for s in held if s.is_last and s.data_rank == 0 for token in s.vocabulary]
    assert tokens[:509] == list(range(509))
    assert len({len(s.vocabulary) for s in held}) == 1


@pytest.mark.parametrize(
    ("served", "parallel", "message"),
    [
        (model(num_heads=6, num_kv_heads=2), {"tensor": 4}, "6 attention heads"),
        (model(num_kv_heads=3, num_heads=12), {"tensor": 2}, "3 KV heads cannot be cut"),
        (model(), {"pipeline": 4}, "3 layers are too few for 4"),
        (model(experts=None, intermediate_size=111), {"tensor": 2}, "intermediate size of 111"),
        (model(experts=replace(EXPERTS, layers=(0,)), intermediate_size=111), {"tensor": 2}, "size of 111"),
        (model(experts=None), {"tensor": 2, "expert": 2}, "this model has none"),
        (model(experts=replace(EXPERTS, layers=())), {"data": 2, "expert": 2}, "this model has none"),
        (model(experts=replace(EXPERTS, num_experts=6)), {"data": 4, "expert": 4}, "6 experts cannot be spread"),
        (model(experts=replace(EXPERTS, intermediate_size=42)), {"tensor": 4}, "42 cannot be cut.*expert parallelism"),
    ],
)
def test_cuts_that_do_not_come_out_even(served: Checkpoint, parallel: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shards(served, **parallel)


def test_experts_that_stay_whole_need_no_even_size() -> None:
    shards(model(experts=replace(EXPERTS, intermediate_size=41), intermediate_size=111), tensor=2, expert=2)


def test_the_leader_of_ranks_loads_no_torch() -> None:
    probe = "import sys, diptych.engine.torch_engine.parallel_engine; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "False"
