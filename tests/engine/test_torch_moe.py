"""Mixtures of experts: the router, the way of rows to experts and back, and whole models against `transformers`."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_harness import Harness, checkpoint, expected_tokens, random_prompt, reference

from diptych.core.errors import CheckpointError
from diptych.core.request import SamplingParams
from diptych.engine.torch_engine.config import ModelConfig, load_config, parse_config
from diptych.engine.torch_engine.experts import LocalExperts, MixtureOfExperts, Router, combine, group_by_expert
from diptych.engine.torch_engine.linear import Linear
from diptych.engine.torch_engine.mlp import SwiGLU
from diptych.engine.torch_engine.runner import TorchEngine

LENGTHS = (1, 2, 16, 33, 130, 290)
NUM_TOKENS = 8
LOGPROBS = SamplingParams(temperature=0.0, logprobs=509)

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"num_experts_per_tok": 1}),
    ("mixtral", {"num_experts_per_tok": 4, "tie_word_embeddings": True}),
    ("mixtral", {"fused_experts": True}),
    ("qwen3moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    ("qwen3moe", {"num_experts_per_tok": 2}),
    ("qwen3moe", {"num_experts_per_tok": 4, "norm_topk_prob": False, "attention_bias": True}),
    ("qwen3moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "fused_experts": True}),
    ("qwen3moe", {"max_shard_size": "200KB"}),
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_variants_give_the_tokens_of_the_reference(family: str, overrides: dict[str, Any]) -> None:
    path = checkpoint(family, **overrides)
    harness = Harness(path)
    prompts = [random_prompt(length, seed=2) for length in LENGTHS]
    outputs = harness.generate([harness.sequence(prompt) for prompt in prompts], NUM_TOKENS)
    for prompt, output in zip(prompts, outputs, strict=True):
        wanted = expected_tokens(path, prompt, NUM_TOKENS)
        assert output[: len(wanted)] == wanted
    assert len({tuple(output) for output in outputs}) > len(LENGTHS) // 2


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_logprobs_are_close_to_the_reference(family: str) -> None:
    harness = Harness(family)
    prompt = random_prompt(300)
    (token,) = harness.step((harness.sequence(prompt, LOGPROBS), 300))
    assert token is not None
    with torch.inference_mode():
        wanted = reference(family)(torch.tensor([prompt])).logits[0, -1].log_softmax(dim=-1)
    found = dict(token.top_logprobs)
    torch.testing.assert_close(torch.tensor([found[index] for index in range(509)]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
@pytest.mark.parametrize("chunk", [1, 16, 50])
def test_chunked_prefill(family: str, chunk: int) -> None:
    harness = Harness(family)
    prompt = random_prompt(120)
    found = harness.generate([harness.sequence(prompt)], NUM_TOKENS, chunk)
    assert found == [expected_tokens(family, prompt, NUM_TOKENS)]


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_sequences_of_all_phases_share_steps(family: str) -> None:
    harness = Harness(family)
    generator = random.Random(4)
    prompts = [random_prompt(length, seed=6) for length in (1, 5, 16, 40, 97, 200)]
    sequences = [harness.sequence(prompt) for prompt in prompts]
    while running := [each for each in sequences if each.num_output_tokens < NUM_TOKENS]:
        chosen = generator.sample(running, generator.randint(1, len(running)))
        harness.step(*((sequence, generator.choice((1, 3, 16, 33, 100))) for sequence in chosen))
    for prompt, sequence in zip(prompts, sequences, strict=True):
        wanted = expected_tokens(family, prompt, NUM_TOKENS)
        assert sequence.output_token_ids[: len(wanted)] == wanted


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_bfloat16_stays_close_to_float32(family: str) -> None:
    """On average: rounding sends some tokens to another expert of nearly the same weight."""
    prompt = random_prompt(100)
    logits = []
    for dtype in ("float32", "bfloat16"):
        harness = Harness(family, dtype=dtype)
        sequence = harness.sequence(prompt, LOGPROBS)
        assert harness.step((sequence, 60)) == [None]
        (token,) = harness.step((sequence, 40))
        assert token is not None
        found = dict(token.top_logprobs)
        logits.append(torch.tensor([found[index] for index in range(509)]))
    assert (logits[0] - logits[1]).abs().mean() < 0.2 < logits[0].std()


def routed_plainly(logits: Tensor, per_token: int, normalized: bool) -> tuple[list[list[int]], list[list[float]]]:
    """Token by token, in Python's floats; of equal probabilities the lower expert comes first."""
    experts, weights = [], []
    for row in logits.tolist():
        total = sum(math.exp(logit) for logit in row)
        chosen = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:per_token]
        chances = [math.exp(row[expert]) / total for expert in chosen]
        experts.append(chosen)
        weights.append([chance / sum(chances) for chance in chances] if normalized else chances)
    return experts, weights


def router_over_identity(num_experts: int, per_token: int, normalized: bool) -> Router:
    """Its rows are the logits."""
    return Router(Linear(torch.eye(num_experts), None), per_token, normalized)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("per_token", [1, 2, 3, 4, 8])
def test_router_agrees_with_a_plain_one(per_token: int, normalized: bool) -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(per_token)) * 3
    routing = router_over_identity(8, per_token, normalized)(logits)
    experts, weights = routed_plainly(logits, per_token, normalized)
    assert routing.experts.tolist() == experts
    torch.testing.assert_close(routing.weights, torch.tensor(weights))


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=1, max_size=12),
    st.integers(1, 9),
)
def test_ties_choose_distinct_experts_of_the_highest_logits_the_same_in_any_batch(
    rows: list[list[int]], per_token: int
) -> None:
    router = router_over_identity(9, per_token, normalized=True)
    logits = torch.tensor(rows, dtype=torch.float32)
    together = router(logits)
    _, weights = routed_plainly(logits, per_token, normalized=True)
    torch.testing.assert_close(together.weights, torch.tensor(weights))  # so the values chosen are the highest
    for row, chosen in enumerate(together.experts.tolist()):
        assert len(set(chosen)) == per_token
        assert sorted((rows[row][expert] for expert in chosen), reverse=True) == sorted(rows[row])[::-1][:per_token]
        assert router(logits[row : row + 1]).experts.tolist() == [chosen]


def test_probabilities_are_float32_even_of_bfloat16_logits() -> None:
    """A softmax in bfloat16 would round the weights before they are normalised."""
    logits = (torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) * 2).bfloat16()
    router = Router(Linear(torch.eye(8).bfloat16(), None), 2, normalized=True)
    routing = router(logits)
    assert routing.weights.dtype == torch.bfloat16
    _, weights = routed_plainly(logits, 2, normalized=True)
    torch.testing.assert_close(routing.weights, torch.tensor(weights).bfloat16(), rtol=2**-8, atol=0)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    num_experts = draw(st.integers(1, 6))
    per_token = draw(st.integers(1, num_experts))
    rows = st.permutations(range(num_experts)).map(lambda order: order[:per_token])
    chosen = draw(st.lists(rows, max_size=10))
    return torch.tensor(chosen, dtype=torch.int64).view(-1, per_token), num_experts


@given(routings())
def test_groups_hold_every_pair_once_in_order(routing: tuple[Tensor, int]) -> None:
    experts, num_experts = routing
    groups = group_by_expert(experts, num_experts)
    pairs = sorted((expert, token) for token, row in enumerate(experts.tolist()) for expert in row)
    assert groups.tokens.tolist() == [token for _, token in pairs]
    assert groups.counts == [sum(expert == each for expert, _ in pairs) for each in range(num_experts)]
    assert [[pairs[place] for place in row] for row in groups.places.tolist()] == [
        [(expert, token) for expert in row] for token, row in enumerate(experts.tolist())
    ]


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_is_the_weighted_sum_of_its_experts(num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype) * 0.3

    experts = [SwiGLU(Linear(drawn(96, 32), None), Linear(drawn(32, 48), None)) for _ in range(5)]
    router = Router(Linear(drawn(5, 32), None), 2, normalized=False)
    rows = drawn(num_tokens, 32)
    found = MixtureOfExperts(router, 5, LocalExperts(experts))(rows)
    routing = router(rows)
    wanted = torch.zeros(num_tokens, 32)
    for token in range(num_tokens):
        for expert, weight in zip(routing.experts[token].tolist(), routing.weights[token].tolist(), strict=True):
            wanted[token] += weight * experts[expert](rows[token : token + 1])[0].float()
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)


def test_only_experts_with_rows_are_touched() -> None:
    touched: list[tuple[int, int]] = []

    def expert(index: int) -> Any:
        def compute(rows: Tensor) -> Tensor:
            touched.append((index, len(rows)))
            return rows + index

        return compute

    experts = torch.tensor([[3, 1], [1, 6]])
    groups = group_by_expert(experts, 8)
    compute = LocalExperts([expert(index) for index in range(8)])
    outputs = compute(torch.zeros(2, 4)[groups.tokens], groups.counts)
    assert touched == [(1, 2), (3, 1), (6, 1)]
    combined = combine(outputs, groups.places, torch.tensor([[0.5, 0.25], [1.0, 2.0]]))
    assert combined[:, 0].tolist() == [0.5 * 3 + 0.25 * 1, 1.0 * 1 + 2.0 * 6]


def test_experts_may_lie_elsewhere() -> None:
    """Rows cut at the boundary between two holders of experts, as several ranks would: nothing else changes."""
    generator = torch.Generator().manual_seed(1)
    experts = [
        SwiGLU(
            Linear(torch.randn(24, 8, generator=generator), None), Linear(torch.randn(8, 12, generator=generator), None)
        )
        for _ in range(6)
    ]
    first, second = LocalExperts(experts[:4]), LocalExperts(experts[4:])

    def compute(rows: Tensor, counts: Sequence[int]) -> Tensor:
        cut = sum(counts[:4])
        return torch.cat((first(rows[:cut], counts[:4]), second(rows[cut:], counts[4:])))

    router = Router(Linear(torch.randn(6, 8, generator=generator), None), 3, normalized=True)
    rows = torch.randn(20, 8, generator=generator)
    assert torch.equal(
        MixtureOfExperts(router, 6, compute)(rows), MixtureOfExperts(router, 6, LocalExperts(experts))(rows)
    )


def config_of(family: str, **changes: Any) -> ModelConfig:
    raw = json.loads((checkpoint(family) / "config.json").read_text())
    return parse_config({key: value for key, value in {**raw, **changes}.items() if value is not ...})


def test_configs() -> None:
    mixtral = load_config(checkpoint("mixtral")).experts
    assert mixtral is not None
    assert (mixtral.layers, mixtral.num_experts, mixtral.per_token) == ((0, 1, 2), 8, 2)
    assert (mixtral.intermediate_size, mixtral.normalized) == (112, True)
    qwen = load_config(checkpoint("qwen3moe")).experts
    assert qwen is not None
    assert (qwen.layers, qwen.num_experts, qwen.per_token) == ((0, 2), 12, 3)
    assert (qwen.intermediate_size, qwen.normalized) == (48, True)
    assert config_of("llama").experts is None
    assert config_of("mixtral", rope_parameters=...).rope.theta == 1e6


def test_both_spellings_of_the_number_of_experts() -> None:
    assert config_of("qwen3moe", num_local_experts=..., num_experts=12) == config_of("qwen3moe")


@pytest.mark.parametrize(
    ("step", "dense", "sparse"),
    [(1, [], (0, 1, 2, 3, 4)), (2, [], (1, 3)), (2, [1], (3,)), (5, None, (4,)), (6, [], ()), (1, [0, 1, 2, 3, 4], ())],
)
def test_which_layers_are_sparse(step: int, dense: list[int] | None, sparse: tuple[int, ...]) -> None:
    config = config_of("qwen3moe", num_hidden_layers=5, decoder_sparse_step=step, mlp_only_layers=dense)
    assert config.experts is not None
    assert config.experts.layers == sparse


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"num_local_experts": ...}, "num_local_experts is None"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0"),
        (
            "mixtral",
            {"num_experts_per_tok": 9},
            r"num_experts_per_tok is 9; it must be at most num_local_experts \(8\)",
        ),
        ("mixtral", {"num_local_experts": 9}, "lacks 9 tensors.*experts.8.w1"),
        ("mixtral", {"num_local_experts": 7}, "unexpected 9 tensors.*experts.7.w1"),
        (
            "mixtral",
            {"intermediate_size": 96},
            r"experts.0.w1.weight has shape \(112, 64\); the config implies \(96, 64\)",
        ),
        ("mixtral", {"sliding_window": 1024}, "sliding_window is 1024"),
        ("qwen3moe", {"moe_intermediate_size": ...}, "moe_intermediate_size"),
        ("qwen3moe", {"moe_intermediate_size": 40}, r"experts.0.gate_proj.weight has shape \(48, 64\)"),
        ("qwen3moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3moe", {"mlp_only_layers": "1"}, "mlp_only_layers"),
        ("qwen3moe", {"mlp_only_layers": []}, "lacks 37 tensors.*layers.1.mlp.experts.0.down_proj"),
    ],
)
def test_config_errors_name_the_field(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    directory = Path(shutil.copytree(checkpoint(family), tmp_path / "model"))
    raw = {**json.loads((directory / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    with pytest.raises(CheckpointError, match=message):
        TorchEngine.load(directory)


def spoil(family: str, directory: Path, changes: dict[str, Any], **overrides: Any) -> Path:
    """A copy of a checkpoint with tensors taken out (...) or replaced."""
    shutil.copytree(checkpoint(family, **overrides), directory)
    tensors = {**load_file(directory / "model.safetensors"), **changes}
    save_file({name: each for name, each in tensors.items() if each is not ...}, directory / "model.safetensors")
    return directory


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    name = "model.layers.2.block_sparse_moe.experts.5.w2.weight"
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors for its config: {name}"):
        TorchEngine.load(spoil("mixtral", tmp_path / "model", {name: ...}))


def test_a_router_of_another_size_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate.weight"
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(11, 64\); the config implies \(12, 64\)"):
        TorchEngine.load(spoil("qwen3moe", tmp_path / "model", {name: torch.zeros(11, 64)}))


def test_fused_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    path = spoil("qwen3moe", tmp_path / "model", {name: torch.zeros(12, 64, 96)}, fused_experts=True)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(12, 64, 96\); the config implies \(12, 96, 64\)"):
        TorchEngine.load(path)


def test_corrupt_rows_leave_their_neighbours_alone() -> None:
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    experts = [SwiGLU(Linear(torch.ones(8, 8), None), Linear(torch.ones(8, 4), None)) for _ in range(4)]
    mixture = MixtureOfExperts(Router(Linear(torch.eye(4, 8), None), 2, normalized=True), 4, LocalExperts(experts))
    healthy = mixture(rows)
    rows[2] = torch.nan
    corrupt = mixture(rows)
    others = [0, 1, 3, 4, 5]
    assert corrupt[2].isnan().all()
    torch.testing.assert_close(corrupt[others], healthy[others])
