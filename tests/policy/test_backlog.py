"""How much of what a worker was given is in a newcomer's way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.policy.backlog import Backlog, Prompt


def backlog(*prompts: Prompt) -> Backlog:
    made = Backlog()
    for prompt in prompts:
        made.add(prompt)
    return made


@pytest.mark.fault(56)
def test_of_others_no_more_counts_than_their_weights_entitle_them_to() -> None:
    there = backlog(Prompt(10_000, "noisy"), Prompt(100, "victim"))
    assert there.ahead_of(Prompt(50, "victim")) == 100 + 150
    assert there.ahead_of(Prompt(50, "victim", weight=3.0)) == 100 + 50
    assert there.ahead_of(Prompt(1, "noisy")) == there.tokens, "all there is, and not twice its own"
    assert backlog(Prompt(70), Prompt(30)).ahead_of(Prompt(1)) == 100


def test_the_longest_of_its_own_is_not_before_a_short_one() -> None:
    there = backlog(Prompt(400, "a"), Prompt(50, "a"), Prompt(900, "b"))
    assert there.own_before(Prompt(100, "a")) == 50
    assert there.own_before(Prompt(101, "a")) == 450
    assert there.own_before(Prompt(1, "c")) == 0


@given(st.lists(st.builds(Prompt, st.integers(1, 5000), st.sampled_from("abc")), max_size=20), st.integers(1, 5000))
def test_what_is_ahead_is_there(prompts: list[Prompt], tokens: int) -> None:
    there = backlog(*prompts)
    for tenant in "abcd":
        newcomer = Prompt(tokens, tenant)
        assert there.own_before(newcomer) <= sum(prompt.tokens for prompt in prompts if prompt.tenant == tenant)
        assert 0 <= there.ahead_of(newcomer) <= there.tokens
        assert there.num_prompts == len(prompts)
