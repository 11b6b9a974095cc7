"""uvicorn in the control plane's own loop: it serves until told to stop, and leaves signals alone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Bytes that the head of a request may have, about: what arrived with its end is not counted.
_MAX_HEAD = 64 << 10
_KEEP_ALIVE = 75
"""Seconds that a connection may be idle."""
_LAST_MOMENT = 1.0


class _Protocol(HttpToolsProtocol):
    """One connection. Adds a bound of the head, OpenAI's shape of errors, and a way to cut off who does not read."""

    _head = -1
    """Bytes read of a head that is not complete; -1 outside of heads."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0
        self.scope["state"]["abort"] = self.transport.abort

    def on_headers_complete(self) -> None:
        self._head = -1
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head >= 0:
            self._head += len(data)
            if self._head > _MAX_HEAD:
                self.send_400_response("the head of the request is too large")

    def send_400_response(self, msg: str) -> None:
        body = (
            b'{"error":{"message":"%b","type":"invalid_request_error","param":null,"code":"bad_http"}}' % msg.encode()
        )
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        self.transport.write(head + b"connection: close\r\n\r\n" + body)
        self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the program's affair."""
        yield


class HttpServer:
    """Answers requests on a socket that listens."""

    def __init__(self, app: ASGIApp, grace: float) -> None:
        """After `stop_accepting`, requests get `grace` seconds."""
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=grace,  # type: ignore[arg-type]  # it is only slept on
        )
        self._server = _Server(config)

    async def serve(self, listening: socket.socket) -> None:
        """Answer requests until `stop_accepting`."""
        server, state = self._server, self._server.server_state
        await server.serve(sockets=[listening])
        if state.tasks:  # cancelled; a moment to say so
            await asyncio.wait(state.tasks, timeout=_LAST_MOMENT)
        for connection in list(state.connections):
            connection.transport.abort()

    def stop_accepting(self) -> None:
        """Close the port and idle connections; what runs goes on for the grace."""
        self._server.should_exit = True

    @property
    def connections(self) -> int:
        """Open now."""
        return len(self._server.server_state.connections)
