"""Text in pieces equals text as a whole."""

import pytest
from front_fakes import byte_level_tokenizer, sentence_piece_backend
from hypothesis import given
from hypothesis import strategies as st

from diptych.front.detokenizer import REPLACEMENT, IncrementalDetokenizer
from diptych.front.tokenizer import ByteTokenizer, TextCodec, Tokenizer

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
LETTERS = st.text(st.sampled_from("theab 你😀é"), max_size=60)


def pieces_of(codec: TextCodec, prompt: list[int], output: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(codec, prompt)
    return [*(detokenizer.add(token_id) for token_id in output), detokenizer.finish()]


@given(ANY_TEXT, ANY_TEXT)
def test_byte_level_text_survives(prompt: str, text: str) -> None:
    codec = byte_level_tokenizer()
    pieces = pieces_of(codec, codec.encode(prompt), codec.encode(text))
    assert "".join(pieces) == text


@pytest.mark.fault(12)
@given(ANY_TEXT)
def test_no_piece_shows_half_a_character(text: str) -> None:
    codec = byte_level_tokenizer()
    text = text.replace(REPLACEMENT, "")
    assert not any(REPLACEMENT in piece for piece in pieces_of(codec, [], codec.encode(text)))


@given(st.lists(st.integers(0, 270), max_size=200))
def test_bytes_that_are_no_text_equal_the_decoded_whole(token_ids: list[int]) -> None:
    for codec in (byte_level_tokenizer(), ByteTokenizer()):
        assert "".join(pieces_of(codec, [], token_ids)) == codec.decode(token_ids)


@given(LETTERS)
def test_sentence_piece_with_byte_fallback(text: str) -> None:
    codec = Tokenizer(sentence_piece_backend())
    assert "".join(pieces_of(codec, [], codec.encode(text))) == codec.decode(codec.encode(text))


def test_first_word_keeps_its_space_after_a_prompt() -> None:
    codec = Tokenizer(sentence_piece_backend())
    prompt, output = codec.encode("a"), codec.encode("the")
    assert "".join(pieces_of(codec, prompt, output)) == " the"
    assert "".join(pieces_of(codec, [], output)) == "the"


def test_character_appears_with_its_last_byte() -> None:
    tokens = list("é😀".encode())
    assert pieces_of(ByteTokenizer(), [], tokens) == ["", "é", "", "", "", "😀", ""]


def test_hopeless_bytes_are_not_held_back_for_ever() -> None:
    pieces = pieces_of(ByteTokenizer(), [], [0xFF] * 500)
    assert len("".join(pieces[:400])) >= 390


def test_special_tokens_have_no_text() -> None:
    codec = byte_level_tokenizer()
    assert "".join(pieces_of(codec, [], [1, *codec.encode("cat"), 2])) == "cat"
