"""A receiver of callbacks: real HTTP on a free port, and a check of signatures that shares no code with the sender."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

PATIENCE = 20.0


@dataclass
class Received:
    """One request that came in."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def notice(self) -> dict[str, Any]:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


Behaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def accept(request: web.Request) -> web.StreamResponse:
    return web.Response(status=204)


@dataclass
class Receiver:
    """Keeps what comes in; answers as the next of `behaviours` says, then as `then`."""

    url: str = ""
    received: list[Received] = field(default_factory=list)
    behaviours: list[Behaviour] = field(default_factory=list)
    then: Behaviour = accept
    at_once: int = 0
    most_at_once: int = 0
    connections: set[Any] = field(default_factory=set)
    transports: list[asyncio.Transport] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        assert request.transport
        self.connections.add(request.transport.get_extra_info("peername"))
        self.transports.append(request.transport)
        try:
            body = await request.read()
            headers = {name.lower(): value for name, value in request.headers.items()}
            now = asyncio.get_running_loop().time()
            self.received.append(Received(request.path_qs, headers, body, now))
            self._news.set()
            behaviour = self.behaviours.pop(0) if self.behaviours else self.then
            return await behaviour(request)
        finally:
            self.at_once -= 1

    def break_off(self) -> None:
        """Break all connections."""
        for transport in self.transports:
            transport.abort()

    async def until(self, count: int) -> list[Received]:
        """Wait until so many requests have come."""
        async with asyncio.timeout(PATIENCE):
            while len(self.received) < count:
                self._news.clear()
                await self._news.wait()
        return self.received


def status(code: int, **headers: str) -> Behaviour:
    async def behave(request: web.Request) -> web.StreamResponse:
        return web.Response(status=code, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return behave


async def reset(request: web.Request) -> web.StreamResponse:
    """Break the connection instead of answering."""
    assert request.transport
    request.transport.abort()
    return web.Response()


async def silence(request: web.Request) -> web.StreamResponse:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError


@asynccontextmanager
async def receiver(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    kept = Receiver()
    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{path:.*}", kept.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    port = runner.addresses[0][1]
    kept.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/hook"
    try:
        yield kept
    finally:
        await runner.cleanup()


def verified(received: Received, secret: str) -> bool:
    """As the specification of Standard Webhooks tells a receiver to check: the content that is signed is
    id.timestamp.payload, signatures are a list separated by spaces, of which one must fit."""
    key = base64.b64decode(secret[len("whsec_") :])
    headers = received.headers
    content = b".".join([headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), received.body])
    wanted = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    versioned = [one.split(",", 1) for one in headers["webhook-signature"].split(" ")]
    return any(version == "v1" and hmac.compare_digest(given, wanted) for version, given in versioned)
