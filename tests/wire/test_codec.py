"""Frames and messages: what does not fit is a ProtocolError, and nothing else."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from diptych.core.errors import ConfigError, ProtocolError
from diptych.core.fleet import KVEndpoint, Manifest, ModelInfo, Role, WorkerStats
from diptych.core.kv_layout import KVLayout
from diptych.core.request import FinishReason, Preference, Request, SampledToken, SamplingParams, TokenOutput
from diptych.transfer import frames
from diptych.wire import messages
from diptych.wire.address import TcpAddress, UnixAddress, parse_address
from diptych.wire.codec import LENGTH, Decoder, encode_frame, frame_length
from hypothesis import given
from hypothesis import strategies as st

REQUEST = Request(
    request_id="r1",
    prompt_token_ids=(1, 2, 3),
    sampling=SamplingParams(temperature=0.5, logit_bias=((4, -1.5),), seed=2**64 - 1, stop_token_ids=(9,)),
    prefer=Preference.SPLIT,
    cache_salt="tenant",
)
OUTPUT = TokenOutput("r1", 0, SampledToken(5, -0.25, ((5, -0.25), (6, -2.0))), FinishReason.STOP)
MANIFEST = Manifest(
    model=ModelInfo(name="m", digest="d", vocab_size=10, max_model_len=20, eos_token_ids=(1,)),
    layout=KVLayout(num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32", block_size=4),
    num_blocks=7,
    endpoints=(KVEndpoint(transport="shm", address="unix:/run/x"),),
)
ENDPOINT = KVEndpoint(transport="tcp", address="tcp:127.0.0.1:1")

FROM_WORKER = [
    messages.Hello(1, "w", 2, 3, Role.MIXED, MANIFEST),
    messages.Heartbeat(WorkerStats(running=3)),
    messages.Granted("r1", b"ticket", 16),
    messages.Prefilled(OUTPUT, 16, 0.5, 1.5),
    messages.Tokens([OUTPUT]),
    messages.Failed("r1", "code", "why"),
    messages.KVEvents([b"a"], [b"b"]),
]
TO_WORKER = [
    messages.Serve(REQUEST, (7,)),
    messages.Reserve(REQUEST, ()),
    messages.Prefill(REQUEST, (), b"ticket", ENDPOINT),
    messages.Abort("r1"),
    messages.WarmUp("w", 4, ENDPOINT),
    messages.Shutdown(),
]
FROM_SOURCE = [
    frames.Pages("r1", b"n" * 16, 3, 0, 2, [2**64 - 1, 0], 512),
    frames.Close("r1", b"n" * 16, 3, SampledToken(5)),
]


def content_of(message: object) -> bytes:
    return encode_frame(message)[LENGTH.size :]


@pytest.mark.parametrize(
    ("union", "message"),
    [(messages.FromWorker, m) for m in FROM_WORKER]
    + [(messages.ToWorker, m) for m in TO_WORKER]
    + [(frames.FromSource, m) for m in FROM_SOURCE],
    ids=lambda value: type(value).__name__,
)
def test_messages_arrive_as_they_were_sent(union: object, message: object) -> None:
    frame = encode_frame(message)
    assert frame_length(frame[: LENGTH.size]) == len(frame) - LENGTH.size
    assert Decoder(union).decode(content_of(message)) == message


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(ProtocolError):
        Decoder(messages.ToWorker).decode(content_of(FROM_WORKER[1]))


@pytest.mark.parametrize(
    "content",
    [
        msgspec.msgpack.encode({"type": "Abort", "request_id": "r", "extra": 1}),
        msgspec.msgpack.encode({"type": "Abort"}),
        msgspec.msgpack.encode({"type": "Abort", "request_id": 7}),
        msgspec.msgpack.encode({"type": "Nothing"}),
        content_of(TO_WORKER[3]) + b"\x00",
        content_of(TO_WORKER[0])[:-3],
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"",
    ],
)
def test_what_does_not_fit_is_a_protocol_error(content: bytes) -> None:
    with pytest.raises(ProtocolError):
        Decoder(messages.ToWorker).decode(content)


@given(st.binary(max_size=200))
def test_random_content_is_a_message_or_a_protocol_error(content: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(Decoder(messages.FromWorker).decode(content), messages.Message)


@given(st.sampled_from(FROM_WORKER), st.data())
def test_a_damaged_message_is_a_message_or_a_protocol_error(message: object, data: st.DataObject) -> None:
    content = bytearray(content_of(message))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ProtocolError):
        assert isinstance(Decoder(messages.FromWorker).decode(content), messages.Message)


def test_frames_have_a_maximum_both_ways() -> None:
    with pytest.raises(ProtocolError, match="exceeds"):
        encode_frame(messages.Abort("x" * 100), max_bytes=50)
    with pytest.raises(ProtocolError, match="limit"):
        frame_length(LENGTH.pack(51), max_bytes=50)
    assert frame_length(LENGTH.pack(50), max_bytes=50) == 50


def test_addresses() -> None:
    assert parse_address("unix:/run/a:b") == UnixAddress("/run/a:b")
    assert parse_address("tcp:127.0.0.1:80") == TcpAddress("127.0.0.1", 80)
    assert parse_address("tcp:[::1]:80") == TcpAddress("::1", 80)
    assert parse_address("tcp:localhost:0") == TcpAddress("localhost", 0)


@pytest.mark.parametrize(
    "text", ["", "unix:", "tcp:127.0.0.1", "tcp::80", "tcp:127.0.0.1:x", "tcp:127.0.0.1:65536", "udp:127.0.0.1:1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        parse_address(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "example.org", "::"])
def test_channels_do_not_leave_this_machine(host: str) -> None:
    with pytest.raises(ConfigError, match="TLS"):
        parse_address(f"tcp:{host}:80")
