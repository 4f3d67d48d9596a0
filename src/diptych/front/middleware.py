"""What happens around every request: its id, and the check of its API key."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diptych.core.errors import AuthenticationFailed
from diptych.front.errors import error_response

REQUEST_ID = b"x-request-id"
UNSAFE = re.compile(r"[^A-Za-z0-9._:/+=-]")
MAX_REQUEST_ID = 128


def header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


class RequestIds:
    """Puts `x-request-id` on every answer: the client's own one, made harmless, or a new one.

    It is a label for logs and nothing else; what identifies a request inside is never the client's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = (header(scope, REQUEST_ID) or b"").decode("latin-1")
        request_id = UNSAFE.sub("", given)[:MAX_REQUEST_ID] or f"req-{secrets.token_hex(12)}"

        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, request_id.encode("ascii"))]
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKeys:
    """Lets `protected` paths through with one of the keys only (`Authorization: Bearer KEY`).

    Digests are compared, all of them, in constant time, so that neither the length of a key nor its
    beginning shows in the time an answer takes. With several keys, `scope["state"]["tenant"]` names the one used.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], protected: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode("utf-8")).digest() for key in keys]
        self._protected = protected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"].startswith(self._protected):
            tenant = self._tenant(header(scope, b"authorization") or b"")
            if tenant is None:
                refusal = AuthenticationFailed("a valid API key is needed: Authorization: Bearer KEY")
                await error_response(refusal)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant if len(self._digests) > 1 else ""
        await self._app(scope, receive, send)

    def _tenant(self, authorization: bytes) -> str | None:
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        matches = [known for known in self._digests if hmac.compare_digest(known, given)]
        return matches[0].hex()[:16] if matches and scheme.lower() == b"bearer" else None
