"""What stand-ins share: an HTTP server on a free port, its record of requests, and faults that tests switch on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from model_servers.engines.simulated.answer import Answer
from tests.conformance.target import Fault

__all__ = ["Fault", "Generation", "Recorded", "StandIn", "Stopped"]


@dataclass
class Recorded:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    """Decoded JSON, None without."""


@dataclass
class Generation:
    """An answer as it was made."""

    request: Any
    wanted: int
    """Tokens that the whole answer would have."""
    generated: int = 0
    cancelled: bool = False
    """The client left before the end."""


class Stopped(Exception):
    """A fault has ended the answer; the connection is gone."""


class StandIn:
    """`async with StandIn() as standin: standin.url`. Subclasses add routes and say what errors look like.

    Faults strike what is generated or embedded; `faulty` says whether other addresses have them too.
    """

    def __init__(self, *, token_seconds: float = 0.0) -> None:
        self.token_seconds = token_seconds
        self.fault: Fault | None = None
        self.everywhere = False
        self.requests: list[Recorded] = []
        self.generations: list[Generation] = []
        self._port = 0
        self._runner: web.AppRunner | None = None

    # ----------------------------------------------------------- lifecycle ---

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Again on the same port, after `stop`."""
        app = web.Application(client_max_size=64 << 20, middlewares=[self._middleware])
        self.add_routes(app.router)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """As if its process were killed: every connection is cut."""
        if self._runner is not None:
            for protocol in list(self._runner.server.connections if self._runner.server else ()):
                if protocol.transport is not None:
                    protocol.transport.abort()
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Any:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # ------------------------------------------------ what subclasses give ---

    def add_routes(self, router: web.UrlDispatcher) -> None:
        raise NotImplementedError

    def can_fail(self, request: web.Request) -> bool:
        """Whether a fault strikes this request."""
        return self.everywhere or request.method == "POST"

    def error_answer(self, status: int) -> web.Response:
        """The vendor's own answer with that status."""
        raise NotImplementedError

    # -------------------------------------------------------------- faults ---

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        raw = await request.read()
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = None
        self.requests.append(Recorded(request.method, request.path, dict(request.headers), body))
        fault = self.fault
        if fault is not None and self.can_fail(request):
            if fault.kind == "hang":
                await asyncio.Event().wait()  # until the client leaves, or the server is stopped
            if fault.kind == "status":
                answer = self.error_answer(fault.status)
                if fault.retry_after is not None:
                    answer.headers["Retry-After"] = f"{fault.retry_after:g}"
                return answer
            if fault.kind == "garbage":
                return web.Response(body=b"\x00\xffthis is no answer\n\n{]", content_type="application/octet-stream")
            if fault.kind == "reset" and fault.pieces == 0:
                self.cut(request)
        try:
            return await handler(request)
        except Stopped:
            return web.Response()  # nobody reads it

    def cut(self, request: web.Request) -> None:
        """Cut the connection without a word."""
        if request.transport is not None:
            request.transport.abort()
        raise Stopped

    async def check_piece(self, request: web.Request, sent: int) -> None:
        """Called before each piece of a streamed answer, `sent` of which are out: stalls or cuts where told to."""
        fault = self.fault
        if fault is not None and fault.kind in ("stall", "reset") and sent >= fault.pieces:
            if fault.kind == "stall":
                await asyncio.Event().wait()
            self.cut(request)

    # ---------------------------------------------------------- generating ---

    @asynccontextmanager
    async def generating(self, request: Any, answer: Answer) -> AsyncIterator[Generation]:
        """Records an answer, and whether the client left before its end."""
        generation = Generation(request, answer.tokens)
        self.generations.append(generation)
        try:
            yield generation
        except (asyncio.CancelledError, ConnectionError, Stopped):
            generation.cancelled = True
            raise

    async def pace(self) -> None:
        await asyncio.sleep(self.token_seconds)


@dataclass
class Slots:
    """As many at the same time as there are slots; counts who runs and who waits."""

    size: int
    running: int = 0
    waiting: int = 0
    _free: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._free = asyncio.Semaphore(self.size)

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()
