"""An HTTP server around the front, inside a loop that somebody else runs."""

from __future__ import annotations

import errno
import functools
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp

from diptych.core.errors import ConfigError
from diptych.front.http_protocol import MAX_REFUSING, BoundedHttpProtocol, ConnectionLimits

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
RESERVED_FILES = 64 + MAX_REFUSING  # of the process: workers' channels, journals, libraries, refusals
MIN_CONNECTIONS = 64


class HttpServer(uvicorn.Server):
    """uvicorn's server, driven step by step: its own `serve` takes over the process's signals and looks ten
    times a second whether it should end."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self.url = url
        config.load()
        self.lifespan = config.lifespan_class(config)


@asynccontextmanager
async def serve(
    app: ASGIApp, sock: socket.socket, grace_seconds: float = 5.0, limits: ConnectionLimits | None = None
) -> AsyncIterator[HttpServer]:
    """Serve `app` on a socket from `bind` while the context lasts; inside it, connections are accepted at
    `server.url`. Running answers may go on for `grace_seconds` after its end."""
    limits = limits or ConnectionLimits()
    host, port = sock.getsockname()[:2]
    config = uvicorn.Config(
        app,
        http=functools.partial(BoundedHttpProtocol, limits=limits),  # type: ignore[arg-type]
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
    server = HttpServer(config, f"http://{f'[{host}]' if ':' in host else host}:{port}")
    await server.startup(sockets=[sock])
    try:
        yield server
    finally:
        await server.shutdown(sockets=[sock])


def connection_limits(wanted: int = ConnectionLimits.max_connections) -> ConnectionLimits:
    """As many connections as are `wanted` and as this process may have files open; the soft limit on those is
    raised as far as it goes. So `accept` never runs out of descriptors.

    Raises ConfigError if that leaves too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < MIN_CONNECTIONS + RESERVED_FILES:
        at_least = MIN_CONNECTIONS + RESERVED_FILES
        raise ConfigError(f"only {soft} files may be open, a server needs {at_least} at least: raise `ulimit -n`")
    affordable = wanted if soft == resource.RLIM_INFINITY else soft - RESERVED_FILES
    return ConnectionLimits(max_connections=min(wanted, affordable))


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket that is bound but does not listen yet (port 0 takes a free one).

    Raises ConfigError, naming the flag to change, if host or port cannot be had."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is not in [0, 65535]; change --port")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        return sock
    except socket.gaierror as error:
        sock.close()
        raise ConfigError(f"host {host!r} cannot be resolved ({error.strerror}); change --host") from error
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is in use; choose another with --port") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"{host} is not an address of this machine; change --host") from error
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror} (--host, --port)") from error
