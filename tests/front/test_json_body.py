"""A body is an object of plain JSON, or it is refused with the place where it is not (faults 1, 3, 4)."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.errors import RequestError
from diptych.front.json_body import parse_object, printable

FINITE = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_json_is_read_as_it_was_written(value: dict[str, object]) -> None:
    assert parse_object(json.dumps(value).encode()) == value


@pytest.mark.fault(1, 3)
@given(st.binary(max_size=60))
def test_nothing_but_a_request_error_comes_out(body: bytes) -> None:
    with suppress(RequestError):
        parse_object(body)


@pytest.mark.fault(1)
@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b'{"model": "tiny", ', "char 18"),
        (b'{"model": tiny}', "char 10"),
        (b'{"a": "\xff"}', "byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "byte 7"),
        (b"", "char 0"),
    ],
)
def test_the_place_is_named(body: bytes, where: str) -> None:
    with pytest.raises(RequestError, match=where):
        parse_object(body)


@pytest.mark.fault(4)
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e400}',
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a": 1, "a": 2}',
        b'{"b": {"a": 1, "a": 2}}',
        b"[1]",
        b"3",
        b"null",
    ],
)
def test_bombs_and_ambiguities(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_object(body)
    assert len(caught.value.message) < 200


def test_duplicate_is_named() -> None:
    with pytest.raises(RequestError) as caught:
        parse_object(b'{"x": 1, "seed": 1, "seed": 2}')
    assert caught.value.param == "seed"


@pytest.mark.fault(65)
@given(st.text(st.characters(), max_size=100))
def test_printable_is_one_line_of_ascii(name: str) -> None:
    shown = printable(name)
    assert shown.isascii()
    assert shown.isprintable()
