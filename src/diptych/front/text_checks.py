"""Text that cannot be text: refused at the door, by the name of the field."""

from __future__ import annotations

from diptych.core.errors import RequestError


def check_text(text: str, param: str) -> None:
    """Raises RequestError for lone surrogates (JSON can carry them, UTF-8 cannot) and for NUL."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param}: lone surrogate at character {error.start}", param=param, code="invalid_text"
        ) from None
    if "\0" in text:
        raise RequestError(f"{param}: NUL at character {text.index(chr(0))}", param=param, code="invalid_text")
