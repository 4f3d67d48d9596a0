"""Log lines that are lines: what others say (names of models, workers and requests, errors' texts) cannot forge one."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class OneLine(logging.Formatter):
    """Escapes what is not printable in a message: line ends, terminal sequences. (Tracebacks keep their lines.)"""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = "".join(map(_printable, record.message))
        return super().formatMessage(record)


def set_up_logging(level: int) -> None:
    """To standard error, from `level` on."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine(FORMAT))
    logging.basicConfig(level=level, handlers=[handler])


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
