"""What happens around every request: its id, and the check of its API key."""

from __future__ import annotations

import re
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diptych.core.errors import AuthenticationFailed
from diptych.front.errors import error_response
from diptych.front.tenants import Tenant, TenantKeys

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

    `scope["state"]["tenant"]` says whose it is.
    """

    def __init__(self, app: ASGIApp, keys: TenantKeys, protected: tuple[str, ...]) -> None:
        self._app = app
        self._keys = keys
        self._protected = protected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"].startswith(self._protected):
            tenant = self._tenant(header(scope, b"authorization") or b"")
            if tenant is None:
                refusal = AuthenticationFailed("a valid API key is needed: Authorization: Bearer KEY")
                await error_response(refusal)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)

    def _tenant(self, authorization: bytes) -> Tenant | None:
        scheme, _, key = authorization.partition(b" ")
        tenant = self._keys.find(key.strip())
        return tenant if scheme.lower() == b"bearer" else None
