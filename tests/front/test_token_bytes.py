"""The bytes of single tokens add up to the text."""

from front_fakes import byte_level_tokenizer, sentence_piece_backend

from diptych.front.tokenizer import Tokenizer


def test_byte_level() -> None:
    codec = byte_level_tokenizer()
    text = "the naïve 你好 😀\n"
    assert b"".join(map(codec.token_bytes, codec.encode(text))).decode() == text
    assert codec.token_bytes(0) == b"<|end|>"
    assert codec.token_bytes(10**6) == b""


def test_sentence_piece() -> None:
    codec = Tokenizer(sentence_piece_backend())
    assert b"".join(map(codec.token_bytes, codec.encode("the é😀"))).decode() == " the é😀"
    assert codec.token_bytes(2) == b"</s>"
