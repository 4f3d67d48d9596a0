"""What fuzzing has found is answered with a message, or with a PeerError that says why; and so is what it finds now."""

from __future__ import annotations

import random

import pytest
from fuzz_corpus import PARSERS, answer, grow, kept


@pytest.mark.parametrize("parser", PARSERS)
def test_inputs_that_are_kept(parser: str) -> None:
    inputs = [content for _, content in kept(parser)]
    assert inputs
    for content in inputs:
        answer(parser, content)  # raises whatever is not a PeerError; which one may change with the messages


@pytest.mark.parametrize("parser", PARSERS)
def test_a_moment_of_fuzzing_finds_no_bug(parser: str) -> None:
    assert not [content.hex() for said, content in grow(parser, 0.1, random.Random()) if said.startswith("BUG")]
