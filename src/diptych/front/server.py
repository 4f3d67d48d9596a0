"""An HTTP server around the front, inside a loop that somebody else runs."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp

from diptych.core.errors import ConfigError
from diptych.front.http_protocol import BoundedHttpProtocol

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75


class HttpServer(uvicorn.Server):
    """uvicorn's server, driven step by step: its own `serve` takes over the process's signals and looks ten
    times a second whether it should end."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self.url = url
        config.load()
        self.lifespan = config.lifespan_class(config)


@asynccontextmanager
async def serve(app: ASGIApp, host: str, port: int, grace_seconds: float = 5.0) -> AsyncIterator[HttpServer]:
    """Serve `app` while the context lasts. Inside it the server accepts connections at `server.url`.

    Args:
        port: 0 chooses a free one.
        grace_seconds: how long running answers may go on after the end of the context.

    Raises:
        ConfigError: host or port cannot be bound; the message names the flag to change.
    """
    sock = bind(host, port)
    config = uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=grace_seconds,  # type: ignore[arg-type]
    )
    server = HttpServer(config, f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}")
    await server.startup(sockets=[sock])
    try:
        yield server
    finally:
        await server.shutdown(sockets=[sock])


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ConfigError."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is not in [0, 65535]; change --port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r} cannot be resolved ({error.strerror}); change --host") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is in use; choose another with --port") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"{host} is not an address of this machine; change --host") from error
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror} (--host, --port)") from error
