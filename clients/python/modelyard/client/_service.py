"""Calls of the services beside the Orchestrator, on the client's one connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

import grpc.aio

from modelyard.client._errors import ModelyardError, SlowReader, StreamBroken, TryAgain, from_call, parsed

if TYPE_CHECKING:
    from modelyard.client._async import AsyncClient

PATIENCE = 60.0
"""Seconds for which a stream that has begun is taken up again when nobody answers."""

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0
_SOUND = 5.0
"""A stream that has held for so many seconds was sound, even if nothing came."""


class Service:
    """Base: the stub of one service, and how its calls are made."""

    def __init__(self, client: AsyncClient, stub: Callable[[Any], Any]) -> None:
        self._client = client
        self._make_stub = stub
        self._made: Any = None

    def _stub(self) -> Any:
        self._client._connected()
        if self._made is None:
            self._made = self._make_stub(self._client._channel)
        return self._made

    async def _call(self, method: str, request: Any, timeout: float | None = None, retries: int | None = None) -> Any:
        """The answer of a unary method; tried again as the client's `retries` say. Raises ModelyardError."""
        client = self._client
        patience = client._patience(timeout, retries)
        while True:
            call = getattr(self._stub(), method)(request, timeout=patience.left(), metadata=client._metadata)
            try:
                return parsed(await client._guarded(call))
            except grpc.aio.AioRpcError as error:
                await patience.wait_or_raise(from_call(error, address=client.address), error)

    def _open(self, method: str, *request: Any) -> Any:
        """A stream."""
        return getattr(self._stub(), method)(*request, metadata=self._client._metadata)

    async def _resumed(self, open: Callable[[], Any], patience: float) -> AsyncGenerator[Any, None]:
        """The messages of a stream that is opened again where it breaks; `open` says from where it goes on."""
        resume = Resume(patience)
        while True:
            resume.opened()
            try:
                async with contextlib.aclosing(self._client._messages(open())) as messages:
                    async for message in messages:
                        resume.came()
                        yield message
                    return
            except ModelyardError as failure:
                await resume.wait_or_raise(failure)


class Resume:
    """Whether and when a stream that broke is opened again."""

    def __init__(self, patience: float) -> None:
        self._clock = asyncio.get_running_loop().time
        self._patience = patience
        self._begun = False
        self._failing_since: float | None = None
        self._pause = _FIRST_PAUSE
        self._opened = 0.0

    def opened(self) -> None:
        """The stream is opened."""
        self._opened = self._clock()

    def came(self) -> None:
        """Something came."""
        self._begun, self._failing_since, self._pause = True, None, _FIRST_PAUSE

    async def wait_or_raise(self, failure: ModelyardError) -> None:
        """Wait until the stream may be opened again, or raise the failure: it cannot be mended so, or too long ago it
        was that anybody answered. One that never began is not waited for: perhaps the address is wrong."""
        now = self._clock()
        if self._begun and now - self._opened > _SOUND:
            self.came()
        if not isinstance(failure, (TryAgain, StreamBroken, SlowReader)):
            raise failure
        if not self._begun and not isinstance(failure, StreamBroken):
            raise failure
        if self._failing_since is None:
            self._failing_since = now
        pause = self._pause if failure.retry_after is None else failure.retry_after
        if now + pause - self._failing_since > self._patience:
            raise failure
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        await asyncio.sleep(pause)
