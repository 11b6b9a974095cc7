"""Connections to one server: a bounded pool, streamed answers, and how long to wait for what.

Importing this module needs aiohttp.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp

from model_servers.engine import EngineFailed, Pool
from model_servers.engines._openai import errors
from model_servers.engines._openai.errors import Source

_LARGEST_LINE = 16 << 20
_LARGEST_ANSWER = 256 << 20
_REST_SECONDS = 0.05
"""How long the end of a stream may lag behind its last piece for the connection to be kept."""
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds."""

    connect: float
    first: float
    """For the first piece of an answer, or for an answer that is not streamed."""
    stall: float
    """Between pieces of an answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes


class Events:
    """The payloads of `data:` lines of one streamed answer, as many at a time as have come."""

    def __init__(self, response: aiohttp.ClientResponse, source: Source, patience: Patience, deadline: float) -> None:
        self._response = response
        self._source = source
        self._patience = patience
        self._deadline = deadline
        self._rest = b""
        self.begun = False
        """Set by the reader once something of the answer has come: from then on pieces must keep coming."""

    async def next(self) -> list[bytes]:
        """At least one payload, or none at the end of the stream. Raises EngineFailed."""
        content = self._response.content
        while True:
            try:
                data = content.read_nowait()  # what is here already needs no timer
                if not data and not content.at_eof():
                    async with asyncio.timeout_at(self._deadline):
                        data = await content.readany()
            except TimeoutError:
                seconds = self._patience.stall if self.begun else self._patience.first
                raise self._source.lost(f"has sent nothing for {seconds:g} s") from None
            except (aiohttp.ClientError, OSError) as error:
                raise self._source.lost(f"broke the connection off ({type(error).__name__})") from None
            found = self._payloads(data)
            if found or not data:
                return found

    def extend(self) -> None:
        """Something has come: the next piece has its own time."""
        self.begun = True
        self._deadline = asyncio.get_running_loop().time() + self._patience.stall

    def _payloads(self, data: bytes) -> list[bytes]:
        # The end of the stream ends a line as well.
        *lines, self._rest = (self._rest + data).split(b"\n") if data else (self._rest, b"")
        if len(self._rest) > _LARGEST_LINE:
            raise self._source.lost("sends a line without an end")
        found = []
        for line in lines:
            if line.startswith(b"data:"):
                found.append(line[5:].strip())
            elif line.startswith((b"{", b"<")):
                found.append(line.strip())  # no event: the reader finds the error in it, or calls it garbage
        return found

    async def drain(self) -> bool:
        """Whether the stream has come to its end, so that its connection can be used again."""
        if self._response.content.at_eof():
            return True
        try:
            async with asyncio.timeout(_REST_SECONDS):
                while await self._response.content.readany():
                    pass
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False
        return True


class Transport:
    """HTTP to one server. Errors are EngineErrors that name it."""

    def __init__(
        self,
        base_url: str,
        *,
        source: Source,
        headers: Callable[[], Mapping[str, str]],
        pool_size: int,
        patience: Patience,
        keep_alive: float,
    ) -> None:
        """`headers`: sent with every request. `keep_alive`: seconds that an idle connection is kept."""
        self._base = base_url.rstrip("/")
        self._source = source
        self._headers = headers
        self._size = pool_size
        self._patience = patience
        self._keep_alive = keep_alive
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self._in_use = self._opened = self._reused = 0

    def move(self, base_url: str) -> None:
        """The server is somewhere else from now on."""
        self._base = base_url.rstrip("/")

    def pool(self) -> Pool:
        return Pool(self._size, self._in_use, self._opened, self._reused)

    async def close(self) -> None:
        """Requests that are under way raise EngineFailed."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str, seconds: float) -> Reply:
        """Whatever the server answers. Raises EngineFailed if it does not. `path` may be a whole address."""
        return await self._whole("GET", path, None, seconds)

    async def post(self, path: str, body: bytes) -> Reply:
        """As `get`, with the patience for first pieces."""
        return await self._whole("POST", path, body, self._patience.first)

    async def _whole(self, method: str, path: str, body: bytes | None, seconds: float) -> Reply:
        try:
            async with asyncio.timeout(seconds):
                async with self._request(method, path, body) as response:
                    return Reply(response.status, response.headers, await self._body(response))
        except TimeoutError:
            raise self._source.lost(f"has not answered within {seconds:g} s") from None

    @asynccontextmanager
    async def stream(self, path: str, body: bytes) -> AsyncIterator[Events]:
        """POST, and the answer as it comes. Leaving the block before the end closes the connection, which is what
        makes the server stop. Raises what an answer other than 200 means, and EngineFailed."""
        deadline = asyncio.get_running_loop().time() + self._patience.first
        async with self._request("POST", path, body, deadline=deadline) as response:
            if response.status != 200:
                try:
                    async with asyncio.timeout_at(deadline):
                        said = await self._body(response)
                except TimeoutError:
                    said = b""
                raise errors.from_response(self._source, response.status, response.headers, said)
            yield Events(response, self._source, self._patience, deadline)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        try:
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > _LARGEST_ANSWER:
                    raise self._source.lost("sends an answer without an end")
            return bytes(body)
        except (aiohttp.ClientError, OSError) as error:
            raise self._source.lost(f"broke the connection off ({type(error).__name__})") from None

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: bytes | None, deadline: float | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        self._in_use += 1
        try:
            response = await self._send(method, path, body, deadline)
            try:
                yield response
            finally:
                # Not read to its end: closed, not given back. That also is what stops a server.
                response.close()
        finally:
            self._in_use -= 1

    async def _send(self, method: str, path: str, body: bytes | None, deadline: float | None) -> aiohttp.ClientResponse:
        session = self._open()
        url = path if path.startswith(("http://", "https://")) else self._base + path
        while True:
            trace = SimpleNamespace(reused=False)
            try:
                async with asyncio.timeout_at(deadline):
                    return await session.request(
                        method,
                        url,
                        data=body,
                        headers={**self._headers(), **(_JSON if body is not None else {})},
                        # A redirect would carry the key elsewhere.
                        allow_redirects=False,
                        trace_request_ctx=trace,
                    )
            except TimeoutError as error:
                # Both a connection that does not come about and an answer that does not begin end here.
                if isinstance(error, aiohttp.ConnectionTimeoutError):
                    raise self._source.lost(f"could not be reached within {self._patience.connect:g} s") from None
                if deadline is None:
                    raise  # the caller's own limit
                raise self._source.lost(f"has sent nothing for {self._patience.first:g} s") from None
            except aiohttp.ServerDisconnectedError:
                if trace.reused and not self._closed:
                    continue  # the server closed an idle connection in the moment in which it was used again
                raise self._source.lost("closed the connection without an answer") from None
            except aiohttp.ClientConnectorError as error:
                raise self._source.lost(f"cannot be reached ({_reason(error)})") from None
            except (aiohttp.ClientError, OSError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not self._closed:
                    raise
                raise self._source.lost(f"broke the connection off ({type(error).__name__})") from None

    def _open(self) -> aiohttp.ClientSession:
        if self._closed:
            raise EngineFailed("the engine was closed")
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_connection_create_end.append(self._on_opened)
            trace.on_connection_reuseconn.append(self._on_reused)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._size, keepalive_timeout=self._keep_alive),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._patience.connect),
                trace_configs=[trace],
                read_bufsize=1 << 18,
            )
        return self._session

    async def _on_opened(self, session: Any, context: SimpleNamespace, params: Any) -> None:
        self._opened += 1

    async def _on_reused(self, session: Any, context: SimpleNamespace, params: Any) -> None:
        self._reused += 1
        context.trace_request_ctx.reused = True


def _reason(error: aiohttp.ClientConnectorError) -> str:
    return error.os_error.strerror or type(error.os_error).__name__
