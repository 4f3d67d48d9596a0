"""Errors as clients see them: OpenAI's nested shape, whatever went wrong and wherever."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from diptych.core.errors import AuthenticationFailed, DiptychError, OverloadedError, RequestError
from diptych.front.json_body import printable

log = logging.getLogger(__name__)

# OpenAI's clients choose their exception class by status, and some tools by `type`.
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
HTTP_CODES = {404: "path_not_found", 405: "method_not_allowed"}
CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it


INTERNAL_ERROR = DiptychError("internal error")
TIMED_OUT = "_timeout"  # what codes of deadlines of ours end with
QUEUE_TIMEOUT = "queue_timeout"  # nobody had room: 503


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def status_of(error: DiptychError) -> int:
    """The HTTP status. A deadline that passed on our side is 504 (one that the client missed is 408 by itself)."""
    timed_out = error.status >= 500 and error.code.endswith(TIMED_OUT) and error.code != QUEUE_TIMEOUT
    return HTTPStatus.GATEWAY_TIMEOUT if timed_out else error.status


def error_body(error: DiptychError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`, for a body or an event of a stream."""
    status = status_of(error)
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = error.param if isinstance(error, RequestError) else None
    return {"error": {"message": error.message, "type": kind, "param": param, "code": error.code}}


def error_headers(error: DiptychError) -> dict[str, str]:
    """When to come back, how to come in, and whether the connection ends."""
    headers = {}
    if isinstance(error, OverloadedError):
        # retry-after counts whole seconds; OpenAI's clients prefer the finer one.
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
        headers["retry-after-ms"] = str(max(1, round(error.retry_after * 1000)))
    if isinstance(error, AuthenticationFailed):
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not going to be read
    return headers


def error_response(error: DiptychError) -> Response:
    headers = error_headers(error)
    return json_response(error_body(error), status_of(error), headers)


async def on_diptych_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, DiptychError)
    if error.status >= 500 and not isinstance(error, OverloadedError):
        log.error("%s failed: %s (%s)", printable(request.scope["path"]), error.message, error.code)
    return error_response(error)


async def on_http_exception(request: HttpRequest, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {printable(request.scope['path'])}"
    refused = RequestError(message, code=HTTP_CODES.get(error.status_code), status=error.status_code)
    response = error_response(refused)
    response.headers.update(error.headers or {})
    return response


async def on_unexpected(request: HttpRequest, error: Exception) -> Response:
    """A bug of ours. The server logs the traceback; the client learns nothing about the inside."""
    response = error_response(INTERNAL_ERROR)
    response.headers["x-request-id"] = request.state.request_id  # this answer is made outside of the middleware
    return response


async def on_disconnect(request: HttpRequest, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
