"""Stop strings are found wherever the text was cut into pieces, and cut exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.front.stop_strings import StopStrings

TEXT = st.text("ab\n", max_size=40)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """The slow way: look at every prefix of the text."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end if include else end - max(map(len, done))], True
    return text, False


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[str, bool]:
    matcher, shown = StopStrings(stops, include), ""
    for piece in pieces:
        text, stopped = matcher.add(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + matcher.finish(), False


@pytest.mark.fault(12)
@given(TEXT, STOPS, st.booleans(), st.lists(st.integers(0, 40), max_size=10))
def test_result_is_that_of_the_whole_text(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    assert run(pieces, stops, include) == expected(text, stops, include)


@given(TEXT, STOPS)
def test_nothing_is_held_back_without_need(text: str, stops: list[str]) -> None:
    matcher, shown = StopStrings(stops), ""
    for char in text:
        piece, stopped = matcher.add(char)
        shown += piece
        if stopped:
            return
    held = text[len(shown) :]
    assert held == "" or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(("include", "shown"), [(False, "one "), (True, "one END")])
def test_stop_string_over_three_pieces(include: bool, shown: str) -> None:
    assert run(["one E", "N", "D two"], ["END"], include) == (shown, True)
