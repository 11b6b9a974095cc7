"""The way to Ollama: its official client over one pool of connections, with errors in our own types."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from model_servers.engine import EngineError, Pool
from model_servers.engines._ollama import faults
from model_servers.engines._ollama.settings import OllamaSettings
from model_servers.engines._ollama.wire import Call, Line, parse_line

if TYPE_CHECKING:
    import httpx
    import ollama

T = TypeVar("T")

_WORK = ("/api/chat", "/api/generate", "/api/embed", "/api/pull")
_IDLE_SECONDS = 60.0
"""How long a connection that nobody uses stays open."""
_END_SECONDS = 0.2


class PoolCount:
    """Counts what the pool does, from the events that httpx tells with each request."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._in_use = 0
        self._opened = 0
        self._reused = 0

    def pool(self) -> Pool:
        """Hits and misses of work; looking at what Ollama runs (every second) would drown them."""
        return Pool(self._size, self._in_use, self._opened, self._reused)

    async def send(
        self, request: httpx.Request, send: Callable[[httpx.Request], Awaitable[httpx.Response]]
    ) -> httpx.Response:
        connected = over = False

        def leave() -> None:
            nonlocal over
            self._in_use -= not over
            over = True

        async def trace(event: str, info: Any) -> None:
            nonlocal connected
            if event == "connection.connect_tcp.started":
                connected = True
            elif event == "http11.response_closed.complete":
                leave()

        request.extensions = {**request.extensions, "trace": trace}
        self._in_use += 1
        try:
            return await send(request)
        except BaseException:
            leave()
            raise
        finally:
            if request.url.path in _WORK:
                self._opened += connected
                self._reused += not connected


class Connection:
    """All requests to one Ollama. Needs the `ollama` package, which is imported here."""

    def __init__(self, settings: OllamaSettings) -> None:
        """Raises ImportError."""
        import httpx
        import ollama

        self.url = settings.url
        self._httpx = httpx
        self._response_error = ollama.ResponseError
        count = self._count = PoolCount(settings.connections)

        class CountedTransport(httpx.AsyncHTTPTransport):
            async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
                response = await count.send(request, super().handle_async_request)
                if response.status_code == 429:  # a proxy's, or the cloud's; the client's error loses the header
                    await response.aclose()
                    raise faults.rate_limited(response.headers.get("retry-after", ""))
                return response

        limits = httpx.Limits(
            max_connections=settings.connections,
            max_keepalive_connections=settings.connections,
            keepalive_expiry=_IDLE_SECONDS,
        )
        # Reading the certificates of the world takes a tenth of a second. Without any, every one is refused.
        verify = True if settings.url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Waiting for an answer has bounds of its own, which know what is waited for.
        self._client = ollama.AsyncClient(
            settings.url,
            timeout=httpx.Timeout(None, connect=settings.connect_seconds),
            transport=CountedTransport(limits=limits, verify=verify),
        )

    def pool(self) -> Pool:
        return self._count.pool()

    async def close(self) -> None:
        await self._client.close()  # type: ignore[no-untyped-call]

    async def ask(self, call: Callable[[ollama.AsyncClient], Awaitable[T]], patience: float, setting: str) -> T:
        """One of the client's methods, in `patience` seconds (named by `setting`). Raises EngineError."""
        try:
            async with asyncio.timeout(patience):
                return await call(self._client)
        except TimeoutError:
            raise faults.silent(patience, setting) from None
        except Exception as error:
            raise self.translate(error, "") from None

    async def post(self, path: str, body: dict[str, Any], patience: float, setting: str, model: str) -> dict[str, Any]:
        """The answer to one request. Raises EngineError."""
        try:
            async with asyncio.timeout(patience):
                found: dict[str, Any] = await self._client._request(dict, "POST", path, json=body)
        except TimeoutError:
            raise faults.silent(patience, setting) from None
        except Exception as error:
            raise self.translate(error, model) from None
        return found

    async def version(self, patience: float) -> str:
        """Raises EngineError."""
        answer = await self.ask(lambda client: client._request(dict, "GET", "/api/version"), patience, "poll_seconds")
        return str(answer.get("version", ""))

    async def stream(self, call: Call) -> AsyncGenerator[Line, None]:
        """The lines of an answer as they come; closing it closes the connection, which ends the work in Ollama.

        The client's own `chat` and `generate` would lose what its types do not know: nested properties of a
        tool's schema, ids of calls, `truncate` and `shift`. What they are built on takes any body and type.
        Raises what `translate` understands.
        """
        lines: Any = await self._client._request(dict, "POST", call.path, json=call.body, stream=True)
        async with aclosing(lines):
            async for line in lines:
                yield parse_line(line)

    async def pull(self, model: str) -> AsyncGenerator[ollama.ProgressResponse, None]:
        """What Ollama tells while it fetches a model. Raises what `translate` understands."""
        lines: Any = await self._client.pull(model, stream=True)
        async with aclosing(lines):
            async for line in lines:
                yield line

    @staticmethod
    async def drain(lines: AsyncGenerator[Any, None]) -> None:
        """Reads on to the end, which has come with the last line: only then can the connection be used again."""
        with suppress(Exception):
            async with asyncio.timeout(_END_SECONDS):
                async for _ in lines:
                    pass

    def translate(self, error: Exception, model: str, *, started: bool = False) -> EngineError:
        """The engine's error for what the client raised. `started`: see faults.from_response."""
        if isinstance(error, EngineError):
            return error
        if isinstance(error, self._response_error):
            return faults.from_response(error.error, error.status_code, model, started=started)
        if isinstance(error, (self._httpx.ConnectError, self._httpx.ConnectTimeout, ConnectionError)):
            return faults.no_connection(self.url)
        if isinstance(error, (self._httpx.DecodingError, ValueError, TypeError, AttributeError, KeyError)):
            return faults.garbage(self.url)
        if isinstance(error, (self._httpx.HTTPError, self._httpx.StreamError, RuntimeError)):
            return faults.broken(self.url)
        raise error
