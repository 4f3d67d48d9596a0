"""The handshake, message by message, without sockets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.errors import HandshakeError
from diptych.wire.handshake import MAGIC, OPENING_BYTES, PROOF_BYTES, REPLY_BYTES, ConnectorSide, ListenerSide

KEY = b"k" * 32


def test_equal_keys_agree_with_messages_of_fixed_sizes() -> None:
    connector, listener = ConnectorSide(KEY), ListenerSide(KEY)
    reply = listener.reply(connector.opening)
    answer = connector.answer(reply)
    listener.check(answer)
    assert (len(connector.opening), len(reply), len(answer)) == (OPENING_BYTES, REPLY_BYTES, PROOF_BYTES)


def test_either_side_finds_out_about_another_key() -> None:
    connector, listener = ConnectorSide(KEY), ListenerSide(b"x" * 32)
    reply = listener.reply(connector.opening)
    with pytest.raises(HandshakeError, match="the listener does not hold"):
        connector.answer(reply)
    listener, connector = ListenerSide(KEY), ConnectorSide(b"x" * 32)
    listener.reply(connector.opening)
    for answer in (bytes(PROOF_BYTES), b"", KEY):
        with pytest.raises(HandshakeError, match="the caller does not hold"):
            listener.check(answer)


def test_a_proof_cannot_be_sent_back_to_its_maker() -> None:
    listener = ListenerSide(KEY)
    reply = listener.reply(MAGIC + bytes(32))
    with pytest.raises(HandshakeError):
        listener.check(reply[-PROOF_BYTES:])
    connector = ConnectorSide(KEY)
    reply = ListenerSide(KEY).reply(connector.opening)
    with pytest.raises(HandshakeError):
        connector.answer(reply[:-PROOF_BYTES] + connector.answer(reply))


@pytest.mark.fault(28)
def test_a_recorded_handshake_is_worth_nothing() -> None:
    connector, listener = ConnectorSide(KEY), ListenerSide(KEY)
    reply = listener.reply(connector.opening)
    answer = connector.answer(reply)
    another_listener = ListenerSide(KEY)
    another_listener.reply(connector.opening)
    with pytest.raises(HandshakeError):
        another_listener.check(answer)
    with pytest.raises(HandshakeError):
        ConnectorSide(KEY).answer(reply)


@given(bit=st.integers(0, REPLY_BYTES * 8 - 1))
def test_every_bit_of_the_reply_counts(bit: int) -> None:
    connector, listener = ConnectorSide(KEY), ListenerSide(KEY)
    reply = bytearray(listener.reply(connector.opening))
    reply[bit // 8] ^= 1 << bit % 8
    with pytest.raises(HandshakeError):
        connector.answer(bytes(reply))


@given(opening=st.binary(max_size=OPENING_BYTES).filter(lambda opening: not opening.startswith(MAGIC)))
def test_strangers_get_no_proof(opening: bytes) -> None:
    with pytest.raises(HandshakeError, match="does not speak this protocol"):
        ListenerSide(KEY).reply(opening)
