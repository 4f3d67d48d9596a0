"""When a running step is not worth finishing: what is decided, and what becomes of those who took part in it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from test_worker_policy import claims_for, kinds, make_policy, make_request, step

from diptych.core import actions as do
from diptych.core import events as on
from diptych.core.kv_layout import SequenceKV
from diptych.core.request import Request
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.engine.scripted import ScriptedModel
from diptych.policy.giving_up import StepWatch
from diptych.policy.resharding import plan_resharding
from diptych.policy.worker import WorkerPolicy

LAYOUT = ScriptedModel(block_size=4).layout
FINISHED = on.StepFinished((), 0.1)


def running(shares: dict[str, int], pushing: tuple[str, ...] = ()) -> do.RunStep:
    """A step with so many tokens of each request, some of which push pages."""
    requests = {name: Request(request_id=name, prompt_token_ids=(1,) * count) for name, count in shares.items()}
    rows = [ScheduledSequence(Sequence.from_log(requests[name]), 0, shares[name], True) for name in shares]
    one_block = plan_resharding(SequenceKV(LAYOUT, [0]), SequenceKV(LAYOUT, [0]), range(1))
    pushes = [do.PushPages(name, claims_for(requests[name], (0,)), one_block) for name in pushing]
    return do.RunStep(Batch(tuple(rows)), tuple(pushes))


def given_up(watch: StepWatch, run: do.RunStep, *unwanted: str) -> bool:
    return watch.decide(run, unwanted) == [do.GiveUpStep()]


def test_a_step_of_nobody_is_given_up_and_only_once() -> None:
    watch, run = StepWatch(), running({"a": 3, "b": 5}, pushing=("a", "b"))
    assert not given_up(watch, run)
    assert given_up(watch, run, "a", "b")
    assert not given_up(watch, run, "a", "b")


def test_it_is_finished_if_most_of_it_is_wanted() -> None:
    watch, run = StepWatch(), running({"a": 4, "b": 3, "c": 2})
    assert not given_up(watch, run, "a")
    assert given_up(watch, run, "a", "c")
    assert given_up(StepWatch(), running({"a": 4, "b": 4}), "a")


def test_it_is_finished_if_it_pushes_pages_that_somebody_wants() -> None:
    assert not given_up(StepWatch(), running({"a": 9, "b": 1}, pushing=("b",)), "a")
    assert given_up(StepWatch(), running({"a": 9, "b": 1}, pushing=("a",)), "a")


def test_others_do_not_lose_two_steps_in_a_row() -> None:
    watch = StepWatch()
    assert given_up(watch, running({"a": 9, "b": 1}), "a")
    watch.observe(on.StepGivenUp())
    second = running({"c": 9, "b": 1})
    assert not given_up(watch, second, "c")
    assert given_up(watch, running({"d": 9}), "d"), "it is nobody's"
    assert not given_up(watch, second, "c"), "others have still not had theirs"
    watch.observe(FINISHED)
    assert given_up(watch, running({"e": 9, "b": 1}), "e")
    assert watch.num_given_up == 1


@given(
    steps=st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9), min_size=1),
            st.sets(st.sampled_from("abcdef")),
            st.sets(st.sampled_from("abcdef")),
        )
    )
)
def test_whatever_is_aborted_others_get_every_second_step(
    steps: list[tuple[dict[str, int], set[str], set[str]]],
) -> None:
    watch, lost = StepWatch(), 0
    for shares, pushing, aborted in steps:
        run = running(shares, tuple(pushing & shares.keys()))
        others = shares.keys() - aborted
        if given_up(watch, run, *(aborted & shares.keys())):
            watch.observe(on.StepGivenUp())
            lost += bool(others)
            assert not others & pushing
            assert sum(shares[name] for name in others) <= sum(shares.values()) / 2
        else:
            watch.observe(FINISHED)
            lost = 0
        assert lost <= 1


def started(**shares: int) -> tuple[WorkerPolicy, do.RunStep]:
    """A worker whose running step has these prompts, which came together."""
    policy = make_policy()
    for name, num_tokens in {"first": 1, **shares}.items():
        policy.handle(on.ServeRequested(make_request(name, num_tokens)), now=0.0)
    run = step(policy, 50)[-1]
    assert isinstance(run, do.RunStep)
    return policy, run


def test_a_step_that_is_given_up_frees_what_is_nobodys_and_runs_again_with_the_rest() -> None:
    policy, run = started(a=5, b=1)
    assert [row.num_tokens for row in run.batch.rows] == [1, 5, 1]
    assert policy.handle(on.AbortRequested("a"), now=1.0) == [do.GiveUpStep()]
    forget, again = policy.handle(on.StepGivenUp(), now=1.1)
    assert forget == do.ForgetRequest("a")
    assert isinstance(again, do.RunStep)
    assert again.batch.rows == (run.batch.rows[0], run.batch.rows[2])
    assert policy.pool.num_used == 2
    assert policy.stats().steps_given_up == 1
    policy.check_integrity()
    assert kinds(step(policy, 51, 60)) == ["SendFirstToken", "SendTokens", "RunStep"]


def test_a_step_that_is_finished_all_the_same_counts() -> None:
    policy, _ = started(a=5)
    assert policy.handle(on.AbortRequested("a"), now=1.0) == [do.GiveUpStep()]
    assert kinds(step(policy, 51, 60)) == ["SendFirstToken", "SendTokens", "ForgetRequest", "RunStep"]
    assert policy.stats().steps_given_up == 0


def test_pages_of_a_prefill_that_is_given_up_are_abandoned() -> None:
    policy = make_policy()
    request = make_request(num_tokens=6)
    policy.handle(on.PrefillRequested(request, claims_for(request, (7, 8))), now=0.0)
    assert policy.handle(on.AbortRequested("r"), now=0.1) == [do.GiveUpStep()]
    assert kinds(policy.handle(on.StepGivenUp(), now=0.2)) == ["AbandonPush", "ForgetRequest"]
    assert policy.pool.num_used == 2
    policy.handle(on.PushStopped("r"), now=0.3)
    assert policy.idle
    assert policy.pool.num_used == 0


def test_a_target_that_is_lost_makes_a_prefill_pointless() -> None:
    policy = make_policy()
    request = make_request(num_tokens=6)
    policy.handle(on.PrefillRequested(request, claims_for(request, (7, 8))), now=0.0)
    assert policy.handle(on.LinkLost("d0", ("r",)), now=0.1) == [do.GiveUpStep()]
    assert "SendFailure" in kinds(policy.handle(on.StepGivenUp(), now=0.2))
