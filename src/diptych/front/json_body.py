"""From bytes of a stranger to plain Python values, or a RequestError that says where they are wrong.

The standard library's decoder is used because it can refuse what faster ones let pass: duplicate keys,
NaN, and numbers that are no longer themselves once they are floats.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from typing import Any

from starlette.requests import Request as HttpRequest

from diptych.core.errors import RequestError
from diptych.front.settings import FrontSettings

INVALID_JSON = "invalid_json"


async def read_json_object(request: HttpRequest, settings: FrontSettings) -> dict[str, Any]:
    """The request's body as a JSON object.

    Raises:
        RequestError: 415, 413, 408, 400 `too_many_values`, or 400 `invalid_json` with the position.
        ClientDisconnect: the client left before its body was complete.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RequestError(
            f"content-type must be application/json, not {media_type[:80]!r}", code="unsupported_media_type", status=415
        )
    try:
        async with asyncio.timeout(settings.body_timeout):
            body = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        message = f"body not complete after {settings.body_timeout:g} s"
        raise RequestError(message, code="request_timeout", status=408) from None
    _check_complexity(body, settings.max_body_values)
    return parse_object(body)


def _check_complexity(body: bytes, max_values: int) -> None:
    """Parsing holds everybody's loop for about a microsecond a value. Counts separators, which is quick;
    those inside strings count too, so the limit is far above what sensible texts hold."""
    if len(body) > max_values and body.count(b",") + body.count(b"[") + body.count(b"{") > max_values:
        raise RequestError(f"body holds more than {max_values} values", code="too_many_values")


async def _read(request: HttpRequest, max_bytes: int) -> bytes:
    too_large = RequestError(f"body is larger than {max_bytes} bytes", code="request_too_large", status=413)
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse strictly: UTF-8, no duplicate keys, no NaN or infinity, bounded depth."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"body is not UTF-8: {error.reason} at byte {error.start}", code=INVALID_JSON) from None
    try:
        value = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno} (char {error.pos})"
        raise RequestError(f"body is not valid JSON: {error.msg} at {where}", code=INVALID_JSON) from None
    except RecursionError:
        raise RequestError("body is nested too deeply", code=INVALID_JSON) from None
    except ValueError:  # an integer of more digits than Python converts
        raise RequestError("body contains a number that is out of range", code=INVALID_JSON) from None
    if not isinstance(value, dict):
        raise RequestError("body must be a JSON object", code=INVALID_JSON)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(printable(name) for name, count in counts.items() if count > 1)
        raise RequestError(f"duplicate key {twice}", param=twice, code=INVALID_JSON)
    return result


def _refuse_constant(name: str) -> float:
    raise RequestError(f"{name} is not a number in JSON", code=INVALID_JSON)


def _finite_float(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise RequestError(f"number out of range: {literal[:40]}", code=INVALID_JSON)
    return value


def printable(name: str) -> str:
    """A client's string cut and escaped so that it can stand in messages, logs and headers."""
    return name[:64].encode("unicode_escape").decode("ascii")
