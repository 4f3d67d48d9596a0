"""Frames and messages: what does not fit is a ProtocolError, and nothing else."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_examples import FROM_SOURCE, FROM_TARGET, FROM_WORKER, TO_WORKER

from diptych.core.errors import ProtocolError
from diptych.transfer import frames
from diptych.wire import messages
from diptych.wire.codec import CHECKSUM_BYTES, LENGTH, MAX_FRAME_BYTES, Decoder, encode_frame, frame_length, seal

DIRECTIONS: list[tuple[Any, list[Any]]] = [
    (messages.FromWorker, FROM_WORKER),
    (messages.ToWorker, TO_WORKER),
    (frames.FromSource, FROM_SOURCE),
    (frames.FromTarget, FROM_TARGET),
]
EVERY = [(union, message) for union, examples in DIRECTIONS for message in examples]
every_message = pytest.mark.parametrize(("union", "message"), EVERY, ids=lambda value: type(value).__name__)


def content_of(message: object) -> bytes:
    return encode_frame(message)[LENGTH.size :]


def encoded(message: object) -> bytes:
    """The message in msgpack."""
    return content_of(message)[CHECKSUM_BYTES:]


@pytest.mark.parametrize(("union", "examples"), DIRECTIONS)
def test_the_examples_are_complete(union: Any, examples: list[Any]) -> None:
    assert {type(message) for message in examples} == set(get_args(union))


@every_message
def test_round_trip(union: Any, message: Any) -> None:
    frame = encode_frame(message)
    assert frame_length(frame[: LENGTH.size]) == len(frame) - LENGTH.size
    assert Decoder(union).decode(content_of(message)) == message


@every_message
def test_no_prefix_of_a_message_is_a_message(union: Any, message: Any) -> None:
    decoder, content = Decoder[Any](union), encoded(message)
    for end in range(len(content)):
        with pytest.raises(ProtocolError):
            decoder.decode(seal(content[:end]))


@every_message
def test_a_flipped_bit_anywhere_is_noticed(union: Any, message: Any) -> None:
    decoder, content = Decoder[Any](union), content_of(message)
    for position, bit in itertools.product(range(len(content)), range(8)):
        spoiled = content[:position] + bytes((content[position] ^ 1 << bit,)) + content[position + 1 :]
        with pytest.raises(ProtocolError, match="damaged"):
            decoder.decode(spoiled)


@every_message
def test_nothing_may_follow_a_message(union: Any, message: Any) -> None:
    with pytest.raises(ProtocolError):
        Decoder(union).decode(seal(encoded(message) + b"\x00"))


@every_message
def test_unknown_and_missing_fields_are_refused(union: Any, message: Any) -> None:
    decoder, fields = Decoder[Any](union), msgspec.to_builtins(message, builtin_types=(bytes,))
    assert decoder.decode(seal(msgspec.msgpack.encode(fields))) == message
    with pytest.raises(ProtocolError, match="unknown field"):
        decoder.decode(seal(msgspec.msgpack.encode({**fields, "kv_pointer": 0xDEADBEEF})))
    for name in fields:
        with pytest.raises(ProtocolError):
            decoder.decode(seal(msgspec.msgpack.encode({key: fields[key] for key in fields if key != name})))


@every_message
def test_messages_of_the_other_directions_are_refused(union: Any, message: Any) -> None:
    for other, _ in DIRECTIONS:
        if other is not union:
            with pytest.raises(ProtocolError):
                Decoder(other).decode(content_of(message))


@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(content: bytes) -> None:
    for union, _ in DIRECTIONS:
        with pytest.raises(ProtocolError):  # to be a message by chance it would have to hold a type's name
            Decoder(union).decode(seal(content))
        with pytest.raises(ProtocolError):
            Decoder(union).decode(content)


@given(choice=st.sampled_from(EVERY), position=st.floats(0, 1, exclude_max=True), noise=st.binary(max_size=8))
def test_a_spoiled_message_is_a_message_or_refused(choice: tuple[Any, object], position: float, noise: bytes) -> None:
    union, message = choice
    content = encoded(message)
    start = int(position * len(content))
    spoiled = content[:start] + noise + content[start + len(noise) :]
    with contextlib.suppress(ProtocolError):
        assert isinstance(Decoder[Any](union).decode(seal(spoiled)), get_args(union))


@pytest.mark.parametrize(
    "content",
    [
        b"\x91" * 100_000,
        b"\x81\xa1a" * 50_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
    ],
    ids=["deep arrays", "deep maps", "long array", "long map", "long bytes"],
)
def test_depth_and_announced_sizes_do_no_harm(content: bytes) -> None:
    for expected in (messages.FromWorker, Any, list[int], dict[str, Any]):
        with pytest.raises(ProtocolError):
            Decoder(expected).decode(seal(content))


def test_sizes_are_limited_on_both_ends() -> None:
    with pytest.raises(ProtocolError, match="a Refused of 116 bytes exceeds the limit of 100"):
        encode_frame(messages.Refused("x" * 85), max_bytes=100)
    assert len(encode_frame(messages.Refused("x" * 69), max_bytes=100)) == 100 + LENGTH.size
    assert frame_length(LENGTH.pack(MAX_FRAME_BYTES)) == MAX_FRAME_BYTES
    with pytest.raises(ProtocolError, match="was announced"):
        frame_length(LENGTH.pack(MAX_FRAME_BYTES + 1))
