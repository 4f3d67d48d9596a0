"""Frames that parse, and mean anything: they may cost their sender's connection, and nothing else."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_source import RawSource
from transfer_harness import EPOCH, LAYOUT, RESHARDED, TOKEN, World, claims_for, world

from diptych.core.events import HandoffComplete, HandoffFailed, WriterGone
from diptych.core.kv_layout import KVLayout, SequenceKV
from diptych.policy.resharding import plan_resharding
from diptych.transfer import frames
from diptych.transfer.frames import FromSource

BLOCKS = (5, 6, 2, 9)
CLAIMS = replace(claims_for("r1", BLOCKS, 1, num_tokens=14), nonce=b"n" * 16)

numbers = st.one_of(st.integers(-2, 6), st.sampled_from((2**31, -(2**63), 2**63 - 1, 2**64 - 1)))
names = st.sampled_from(("r1", "r2", ""))
nonces = st.sampled_from((CLAIMS.nonce, b"", b"x" * 16))
epochs = st.sampled_from((EPOCH, EPOCH - 1, 2**63))
pages = st.builds(
    frames.Pages,
    request_id=names,
    nonce=nonces,
    epoch=epochs,
    layer=numbers,
    num_layers=numbers,
    pair=numbers,
    first_group=numbers,
    digests=st.one_of(st.binary(max_size=40), st.integers(0, 5).map(lambda count: bytes(8 * count))),
    nbytes=st.one_of(numbers, st.sampled_from((0, 64, 128, 256, 512))),
)
about = {"request_id": names, "nonce": nonces}
anything: st.SearchStrategy[FromSource] = st.one_of(
    pages,
    pages,
    st.builds(frames.Begin, **about, epoch=epochs),
    st.builds(frames.Close, **about, epoch=epochs, num_frames=numbers, token=st.just(TOKEN), payload=st.just(b"")),
    st.builds(frames.Stopped, **about),
    st.builds(frames.Join, link=st.binary(max_size=20)),
    st.just(frames.PushHello(1, "p", LAYOUT, "model", False)),
)


def served_as_ever(made: World) -> None:
    claims = claims_for("good", (7, 8, 1, 0))
    made.receiver.expect(claims)
    with RawSource(made) as source:
        table = SequenceKV(made.source.layout, (4, 3, 2, 1))
        plan = plan_resharding(table, SequenceKV(LAYOUT, claims.blocks), range(claims.num_tokens))
        assert source.begin(claims) == frames.Go("good", claims.nonce)
        for sendable in source.frames_of(claims, plan):
            source.send(sendable)
        source.close_handoff(claims)
        assert source.connection.receive(20) == frames.Accepted("good", claims.nonce)
    events = [made.at_target.next()]
    while events[-1].request_id != "good":
        events.append(made.at_target.next())
    assert events[-1] == HandoffComplete("good", TOKEN)
    assert all(isinstance(event, HandoffFailed) for event in events[:-1])  # of the hostile one


def others_than(made: World, blocks: tuple[int, ...]) -> list[bytes]:
    """The target's memory, without these blocks."""
    return [
        made.block(made.target, layer, block)
        for layer in range(LAYOUT.num_layers)
        for block in range(made.target.num_blocks)
        if block not in blocks
    ]


def say(source: RawSource, said: list[FromSource]) -> None:
    """With as much payload as is announced, if that is not too much."""
    for frame in said:
        nbytes = frame.nbytes if isinstance(frame, frames.Pages) else 0
        source.connection.send(frame, [memoryview(b"s" * nbytes)] if 0 < nbytes <= 4096 else ())


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("layout", [LAYOUT, RESHARDED], ids=["equal", "re-sharded"])
@settings(deadline=None, max_examples=40)
@given(said=st.lists(anything, max_size=8))
def test_frames_that_mean_anything(transport: str, layout: KVLayout, said: list[FromSource]) -> None:
    with tempfile.TemporaryDirectory() as directory, world(transport, Path(directory), 0, layout, LAYOUT) as made:
        made.receiver.expect(CLAIMS)
        before = others_than(made, BLOCKS[1:])
        with RawSource(made) as source, contextlib.suppress(OSError):
            assert isinstance(source.begin(CLAIMS), frames.Go)
            say(source, said)
        assert others_than(made, BLOCKS[1:]) == before
        served_as_ever(made)
        made.receiver.revoke("r1")
        event = made.at_target.next()
        if isinstance(event, HandoffFailed):
            event = made.at_target.next()
        assert event == WriterGone("r1")


sizes = st.one_of(st.integers(1, 64), st.sampled_from((2**20, 2**40, 2**62)))


@settings(deadline=None, max_examples=60)
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "num_layers": sizes,
            "num_kv_heads": sizes,
            "head_dim": sizes,
            "dtype": st.sampled_from(("float16", "uint8", "float32")),
            "block_size": sizes,
            "tensor_parallel": sizes,
            "pipeline_parallel": sizes,
            "data_parallel": sizes,
            "expert_parallel": sizes,
        },
    )
)
def test_layouts_that_mean_anything(fields: dict[str, Any]) -> None:
    """A source of any layout is either served or told why it is not; at no cost that grows with what it says."""
    try:
        layout = replace(LAYOUT, **fields)
    except ValueError:
        return
    with tempfile.TemporaryDirectory() as directory, world("tcp", Path(directory)) as made:
        made.receiver.expect(CLAIMS)
        with RawSource(made, layout=layout) as source:
            assert isinstance(source.welcome, frames.PushWelcome | frames.Refused)
            if isinstance(source.welcome, frames.PushWelcome):
                assert isinstance(source.begin(CLAIMS), frames.Go)
            else:
                assert source.welcome.message
        served_as_ever(made)
