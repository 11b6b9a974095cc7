"""The port of the gateway. It listens from the start; the HTTP stack, 6 MB, is loaded when somebody comes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from control_plane.gateway.server import HttpServer


class HttpDoor:
    """Listens from its creation on; `serve` answers."""

    def __init__(self, load: Callable[[], HttpServer], host: str, port: int) -> None:
        """`load` is called once, in a thread. Raises OSError with a message for people."""
        self._load = load
        self._socket = _listen(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        self._server: HttpServer | None = None
        self._wake = asyncio.Event()
        self._stopping = False
        self._ended = asyncio.Event()

    async def serve(self) -> None:
        """Answer requests until `stop_accepting`."""
        loop = asyncio.get_running_loop()
        try:
            loop.add_reader(self._socket, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                loop.remove_reader(self._socket)
            if not self._stopping:
                server = await asyncio.to_thread(self._load)  # requests of others go on meanwhile
                self._server = server
            if not self._stopping:
                await server.serve(self._socket)
        finally:
            self._socket.close()
            self._ended.set()

    def stop_accepting(self) -> None:
        """Close the port and idle connections; what runs goes on for the grace of the server."""
        self._stopping = True
        self._wake.set()
        if self._server is not None:
            self._server.stop_accepting()

    @property
    def connections(self) -> int:
        """Open now."""
        return 0 if self._server is None else self._server.connections

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
