"""The sampler against plain reference code, `transformers`' processors, and the promised independence."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from diptych.core.errors import EngineCorrupt, ServingError
from diptych.core.request import Request, SamplingParams
from diptych.core.sequence import Sequence
from diptych.engine.torch_engine.sampler import Sampler, uniform

EOS = 1
VOCAB = 37


def sequence(params: SamplingParams, prompt: tuple[int, ...] = (3, 4, 5), output: tuple[int, ...] = ()) -> Sequence:
    request = Request(request_id=f"{id(params)}", prompt_token_ids=prompt, sampling=params)
    return Sequence.from_log(request, output)


def random_logits(rows: int, vocab_size: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return 3.0 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def sample_one(logits: torch.Tensor, drawn: Sequence) -> int:
    return Sampler((EOS,)).sample(logits[None], [drawn])[0].token_id


def plain_distribution(logits: list[float], params: SamplingParams) -> list[float]:
    """Temperature, top_k, top_p, min_p as their definitions say, one token at a time."""
    weights = [math.exp((logit - max(logits)) / params.temperature) for logit in logits]
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])
    if params.top_k:
        ranked = ranked[: params.top_k]
    if params.top_p < 1.0:
        total, mass, kept = sum(weights[token] for token in ranked), 0.0, []
        for token in ranked:
            if mass / total < params.top_p:
                kept.append(token)
            mass += weights[token]
        ranked = kept
    ranked = [token for token in ranked if weights[token] >= params.min_p * weights[ranked[0]]]
    total = sum(weights[token] for token in ranked)
    return [weights[token] / total if token in set(ranked) else 0.0 for token in range(len(weights))]


def plain_draw(probabilities: list[float], chance: float) -> int:
    mass = 0.0
    for token, probability in enumerate(probabilities):
        mass += probability
        if chance < mass:
            return token
    raise AssertionError("probabilities do not add up to one")


PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 2.0),
    top_k=st.integers(0, 2 * VOCAB),
    top_p=st.floats(0.05, 1.0),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    seed=st.integers(0, 2**64 - 1),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 1000))
def test_draws_equal_the_plain_reference(params: list[SamplingParams], logits_seed: int) -> None:
    logits = random_logits(len(params), seed=logits_seed)
    tokens = Sampler((EOS,)).sample(logits, [sequence(each) for each in params])
    for row, each in enumerate(params):
        wanted = plain_draw(plain_distribution(logits[row].tolist(), each), uniform(each.seed, 0))
        assert tokens[row].token_id == wanted


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.5, min_p=0.1),
    ],
)
def test_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    """A chi-square test with a fixed seed; 1e-4 is the chance that a right sampler would have failed it."""
    logits = random_logits(1, seed=11)[0]
    draws = 4000
    drawn = [sequence(params, output=(0,) * index) for index in range(draws)]
    counts = Counter(token.token_id for token in Sampler((EOS,)).sample(logits.expand(draws, -1), drawn))
    expected = [draws * share for share in plain_distribution(logits.tolist(), params)]
    common = [token for token in range(VOCAB) if expected[token] >= 5]
    rare = draws - sum(expected[token] for token in common)
    chi_square = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in common)
    if rare >= 5:
        chi_square += (draws - sum(counts[token] for token in common) - rare) ** 2 / rare
    freedom = len(common)
    # Wilson-Hilferty: the 99.99 % point of chi-square.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit
    assert all(expected[token] > 0 for token in counts)


def test_truncation_equals_transformers() -> None:
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02)
    logits = random_logits(1, seed=5)
    scores = logits
    for warp in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)):
        scores = warp(None, scores)
    kept = {int(token) for token in scores[0].isfinite().nonzero()}
    drawn = [sequence(params, output=(0,) * index) for index in range(3000)]
    seen = {token.token_id for token in Sampler((EOS,)).sample(logits.expand(3000, -1), drawn)}
    assert seen == kept


def test_top_p_over_a_flat_vocabulary_looks_past_its_first_candidates() -> None:
    logits = torch.zeros(5000)
    logits[:100] = 1e-3
    params = [SamplingParams(top_p=0.999, seed=seed) for seed in range(200)]
    tokens = Sampler(()).sample(logits.expand(200, -1), [sequence(each) for each in params])
    assert max(token.token_id for token in tokens) > 4000


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits = random_logits(8, vocab_size=2000)
    params = [
        SamplingParams(temperature=0.3 * (row + 1), top_p=1 - row / 20, top_k=row * 3, seed=row) for row in range(8)
    ]
    rows = [sequence(each, output=(0,) * index) for index, each in enumerate(params)]
    together = [token.token_id for token in Sampler(()).sample(logits, rows)]
    order = list(range(8))
    random.Random(0).shuffle(order)
    shuffled = [token.token_id for token in Sampler(()).sample(logits[order], [rows[row] for row in order])]
    assert together == [sample_one(logits[row], rows[row]) for row in range(8)]
    assert shuffled == [together[row] for row in order]


def test_uniform_is_a_fixed_function_of_seed_and_index() -> None:
    assert uniform(0, 0) == 0.08167102267756743
    assert uniform(2**64 - 1, 100_000) == 0.3110562040215954
    values = [uniform(seed, index) for seed in range(50) for index in range(50)]
    assert len(set(values)) == 2500
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / 2500 - 0.5) < 0.02


def test_extreme_temperatures_and_uniforms() -> None:
    logits = random_logits(1)[0]
    assert sample_one(logits, sequence(SamplingParams(temperature=1e-300))) == int(logits.argmax())
    only = torch.full((VOCAB,), -1e30)
    only[7] = 0.0
    assert {sample_one(only, sequence(SamplingParams(seed=seed))) for seed in range(20)} == {7}


def test_repetition_penalty_equals_transformers() -> None:
    logits = random_logits(1, seed=2)
    log = (3, 4, 5, 9, 9, 30)
    params = SamplingParams(temperature=0.0, repetition_penalty=1.7, logprobs=0)
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([log]), logits.clone())
    for shift in range(VOCAB):  # every token gets to be the favourite once
        boosted = logits.clone()
        boosted[0, shift] += 8.0
        wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([log]), boosted.clone())
        assert sample_one(boosted[0], sequence(params, log[:3], log[3:])) == int(wanted.argmax())


def test_frequency_and_presence_count_the_output_alone() -> None:
    logits = torch.zeros(VOCAB)
    logits[3], logits[9], logits[10], logits[11] = 1.0, 2.0, 1.5, 0.3
    output = (9, 9, 10)

    def favourite(**penalties: float) -> int:
        return sample_one(logits, sequence(SamplingParams(temperature=0.0, **penalties), (3, 3, 3), output))

    assert favourite() == 9
    assert favourite(frequency_penalty=0.4) == 9  # 1.2 against 1.1 and 1.0
    assert favourite(frequency_penalty=0.51) == 3  # 0.98, 0.99, and the prompt's 3 keeps 1.0
    assert favourite(presence_penalty=0.9) == 9  # once, however often it stands there
    assert favourite(presence_penalty=1.1) == 3
    assert favourite(presence_penalty=-2.0, frequency_penalty=1.9) == 10


def test_counts_follow_the_log_step_by_step_and_after_a_resume() -> None:
    params = SamplingParams(temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.4, seed=3)
    running, sampler = sequence(params), Sampler((EOS,))
    for step in range(40):
        running.token_ids.append(sampler.sample(random_logits(1, seed=step), [running])[0].token_id)
    for cut in (0, 1, 17, 39):
        resumed = Sequence.from_log(running.request, tuple(running.output_token_ids[:cut]))
        for same_process in (sampler, Sampler((EOS,))):
            token = same_process.sample(random_logits(1, seed=cut), [resumed])[0].token_id
            assert token == running.output_token_ids[cut]
    sampler.forget(running.request_id)
    sampler.forget("unknown")


def test_bias_comes_before_penalties_and_can_ban() -> None:
    logits = random_logits(1)[0]
    best = int(logits.argmax())
    banned = SamplingParams(temperature=0.0, logit_bias=((best, -100.0),))
    assert sample_one(logits, sequence(banned)) == int(logits.argsort()[-2])
    forced = SamplingParams(temperature=1.0, logit_bias=((8, 100.0),))
    assert sample_one(logits, sequence(forced)) == 8
    # The prompt holds 4, so its biased 3 is halved and loses against 2. A penalty before the bias would leave it 3.
    flat = torch.zeros(VOCAB)
    flat[6] = 2.0
    order = SamplingParams(temperature=0.0, logit_bias=((4, 3.0),), repetition_penalty=2.0)
    assert sample_one(flat, sequence(order)) == 6


@pytest.mark.parametrize(("ignore_eos", "wanted"), [(False, 12), (True, EOS)])
def test_min_tokens_bars_every_token_that_would_stop(ignore_eos: bool, wanted: int) -> None:
    logits = torch.zeros(VOCAB)
    logits[20], logits[EOS], logits[12] = 3.0, 2.0, 1.0
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(20,), ignore_eos=ignore_eos)
    assert sample_one(logits, sequence(params)) == wanted
    assert sample_one(logits, sequence(params, output=(0,))) == wanted
    assert sample_one(logits, sequence(params, output=(0, 0))) == 20


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(2, seed=9)
    params = SamplingParams(temperature=0.5, logit_bias=((2, 100.0),), logprobs=3)
    token, none = Sampler(()).sample(logits, [sequence(params), sequence(SamplingParams())])
    wanted = logits[0].log_softmax(dim=-1)
    assert token.token_id == 2
    assert token.logprob == pytest.approx(wanted[2].item())
    assert [index for index, _ in token.top_logprobs] == wanted.argsort(descending=True)[:3].tolist()
    assert [value for _, value in token.top_logprobs] == pytest.approx(wanted.sort(descending=True).values[:3].tolist())
    assert none.logprob is None
    assert none.top_logprobs == ()
    (bare,) = Sampler(()).sample(logits[:1], [sequence(SamplingParams(logprobs=0))])
    assert bare.logprob is not None
    assert bare.top_logprobs == ()


@pytest.mark.fault(50)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poisoned_rows_are_named(poison: float) -> None:
    logits = random_logits(3)
    logits[1, 5] = poison
    rows = [sequence(SamplingParams()) for _ in range(3)]
    with pytest.raises(EngineCorrupt) as caught:
        Sampler(()).sample(logits, rows)
    assert isinstance(caught.value, ServingError)
    assert caught.value.code == "engine_corrupt"
    assert caught.value.request_ids == (rows[1].request_id,)
