"""Which bytes one token stands for. Needed for log-probabilities, where tokens are shown one by one.

A tokenizer writes its vocabulary in an alphabet of its own; the names of its decoder steps say which.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable ones for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def token_bytes_function(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """A function from a vocabulary entry to its bytes, for the `decoder` section of a tokenizer.json."""
    kinds = _kinds(decoder)
    if "ByteLevel" in kinds:
        alphabet = _byte_level_alphabet()

        def byte_level(entry: str) -> bytes:
            if all(char in alphabet for char in entry):
                return bytes(alphabet[char] for char in entry)
            return entry.encode("utf-8")

        return byte_level

    def sentence_piece(entry: str) -> bytes:
        single = BYTE_TOKEN.fullmatch(entry) if "ByteFallback" in kinds else None
        return bytes([int(single[1], 16)]) if single else entry.replace("\u2581", " ").encode("utf-8")

    return sentence_piece


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_kinds(step) for step in decoder.get("decoders", ())))
