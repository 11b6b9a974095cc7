"""uvicorn in the control plane's own loop: it serves until told to stop, and leaves signals alone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

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
    """Listens from its creation on; `serve` answers."""

    def __init__(self, app: ASGIApp, host: str, port: int, grace: float) -> None:
        """Raises OSError with a message for people. After `stop`, requests get `grace` seconds."""
        self._socket = _listen(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        self._ended = asyncio.Event()
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

    async def serve(self) -> None:
        """Answer requests until `stop`."""
        server, state = self._server, self._server.server_state
        try:
            await server.serve(sockets=[self._socket])
            if state.tasks:  # cancelled; a moment to say so
                await asyncio.wait(state.tasks, timeout=_LAST_MOMENT)
            for connection in list(state.connections):
                connection.transport.abort()
        finally:
            self._socket.close()
            self._ended.set()

    def stop_accepting(self) -> None:
        """Close the port and idle connections; what runs goes on for the grace."""
        self._server.should_exit = True

    @property
    def connections(self) -> int:
        """Open now."""
        return len(self._server.server_state.connections)

    async def ended(self) -> None:
        """Wait until everything is closed."""
        await self._ended.wait()


def _listen(host: str, port: int) -> socket.socket:
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{where}: {reason}: choose another with --gateway.port, or -1 for none") from error
