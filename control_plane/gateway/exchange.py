"""One HTTP request and the answer to it, over ASGI."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from control_plane.api.tenant import TENANT_KEY
from control_plane.domain.errors import draining
from control_plane.fleet.server import Flight
from control_plane.gateway.answers import Stream, encode
from control_plane.gateway.errors import Failure, HttpRefusal, failure, refuse
from modelyard.openai.wire import ErrorResponse
from modelyard.rpc.errors import Refusal
from modelyard.rpc.reasons import Reason

log = logging.getLogger(__name__)

T = TypeVar("T")

_JSON = (b"content-type", b"application/json")
_EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_REQUEST_ID = re.compile(rb"[\x20-\x7e]{1,64}")


class Gone(Exception):
    """The client went away."""


class Exchange:
    """Reads the request, sends the answer, and knows how a failure is to be told at each moment."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.gone = False
        self.started = False
        self.stream: Stream | None = None
        """Set while an answer is streamed."""
        self.rename: Callable[[str], str] | None = None
        """From a path of the contract to one of the request."""
        self.flight: Flight | None = None
        """Where the request runs, or last ran."""
        self.attempts = 0
        self.decision = ""
        self._receive = receive
        self._send = send
        given = self.headers.get(b"x-request-id", b"")
        self._bad_id = bool(given) and not _REQUEST_ID.fullmatch(given)
        self.tenant = [
            (TENANT_KEY, value.decode("latin-1")) for name, value in scope["headers"] if name == b"x-modelyard-tenant"
        ]
        """The header X-Modelyard-Tenant, as metadata."""
        self.request_id = given.decode() if given and not self._bad_id else secrets.token_hex(16)

    # ------------------------------------------------------------- request ---

    def check(self, methods: tuple[str, ...]) -> None:
        """Raises for what is wrong with the head of the request."""
        if self.scope["method"] not in methods:
            allowed = ", ".join(methods)
            raise HttpRefusal(
                405, f"{self.scope['method']} is not supported here, only {allowed}", ((b"allow", allowed.encode()),)
            )
        if self._bad_id:
            raise refuse("X-Request-Id", "must be at most 64 printable ASCII characters")

    async def body(self, limit: int, within: float) -> bytes:
        """The body, of at most `limit` bytes, that arrives within so many seconds."""
        # A browser sends JSON elsewhere only after asking, and is then refused: without this any
        # web page could use a gateway on its visitor's loopback interface.
        media_type = self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if media_type != b"application/json":
            raise HttpRefusal(415, "send JSON, with the header Content-Type: application/json")
        if self.headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            raise HttpRefusal(415, "compressed bodies are not supported")
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(within):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size > limit:
                        raise _too_large(limit)
                    pieces.append(piece)
                    if not message.get("more_body"):
                        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        except TimeoutError:
            raise HttpRefusal(408, f"the body did not arrive within {within:g} s") from None

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when the client goes away."""
        watch = asyncio.ensure_future(self._until_gone(asyncio.current_task()))
        try:
            return await work
        finally:
            watch.cancel()

    async def _until_gone(self, task: asyncio.Task[Any] | None) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        # The server tells the end of a complete answer in the same way.
        if not self._complete and task is not None:
            self.gone = True
            task.cancel()

    _complete = False

    # -------------------------------------------------------------- answer ---

    def _choice(self) -> list[tuple[bytes, bytes]]:
        flight = self.flight
        if flight is None:
            return []
        headers = [
            (b"x-modelyard-server", _header(flight.server_id)),
            (b"x-modelyard-model", _header(flight.model)),
            (b"x-modelyard-provider", _header(flight.provider)),
            (b"x-modelyard-attempts", b"%d" % self.attempts),
        ]
        if self.decision:
            headers.append((b"x-modelyard-decision", _header(self.decision)))
        return headers

    async def respond(self, body: bytes, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        """Send a whole answer."""
        self.started = self._complete = True
        head = [
            _JSON,
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", self.request_id.encode()),
            *self._choice(),
            *headers,
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": head})
        await self._send({"type": "http.response.body", "body": body})

    async def begin(self, stream: Stream) -> None:
        """Send the head of an answer that comes in pieces."""
        self.started, self.stream = True, stream
        head = [*_EVENTS, (b"x-request-id", self.request_id.encode()), *self._choice()]
        await self._send({"type": "http.response.start", "status": 200, "headers": head})

    async def send(self, events: bytes, last: bool = False) -> None:
        """Send the next events."""
        self._complete = last
        await self._send({"type": "http.response.body", "body": events, "more_body": not last})

    async def fail(self, error: BaseException) -> None:
        """Tell why there is no answer, or no more of it."""
        if isinstance(error, Gone) or self.gone or self._complete:
            return
        told = self._failure(error)
        if told.reason is Reason.SLOW_READER:
            # Nothing more would be read, and what lies in the buffers must not stay for ever.
            self.scope["state"]["abort"]()
            while (await self._receive())["type"] != "http.disconnect":
                pass  # the server would complain of an answer without an end
        elif self.stream is not None:
            await self.send(self.stream.failure(told.body), last=True)
        else:
            headers = [(b"x-modelyard-reason", told.reason.encode())]
            if told.retry_after is not None:
                headers.append((b"retry-after", b"%d" % math.ceil(told.retry_after)))
                headers.append((b"retry-after-ms", b"%d" % math.ceil(told.retry_after * 1000)))
            if isinstance(error, HttpRefusal):
                headers += error.headers
            await self.respond(encode(ErrorResponse(error=told.body)), told.status, tuple(headers))

    def _failure(self, error: BaseException) -> Failure:
        if isinstance(error, Refusal):
            if error.reason is Reason.INTERNAL:
                log.error("%s failed: %s", self.scope["path"], error.message)
            return failure(error, self.rename)
        if isinstance(error, asyncio.CancelledError):  # not by the client, so by the end of the drain
            over = draining()
            return failure(Refusal(Reason.DRAINING, over.message, retry_after=over.retry_after))
        incident = secrets.token_hex(4)
        log.error("%s failed, incident %s", self.scope["path"], incident, exc_info=error)
        told = f"a bug in modelyard; its log has the details under incident {incident}"
        return failure(Refusal(Reason.INTERNAL, told))


def _too_large(limit: int) -> HttpRefusal:
    return HttpRefusal(413, f"the body is larger than {limit} bytes, the most that is accepted")


@functools.lru_cache(maxsize=1024)
def _header(text: str) -> bytes:
    """A text as it can stand in a header."""
    return re.sub(r"[^\x20-\x7e]", "?", text)[:4096].encode()
