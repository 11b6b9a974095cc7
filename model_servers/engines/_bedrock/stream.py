"""A blocking call of the SDK on a thread, its items on the event loop.

boto3 blocks. What makes a blocked thread come back is its socket being shut down: `Line` knows the socket of the
call that its thread is making, so that leaving an answer ends the HTTP connection at once.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Executor
from typing import Any, TypeVar

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)

T = TypeVar("T")

_AHEAD = 16
"""Items that a thread may be ahead of the loop."""

_calls = threading.local()
_lock = threading.Lock()


class Left(Exception):
    """Nobody waits for the outcome any more."""


class Line:
    """The connection of one call; can be cut from another thread."""

    def __init__(self) -> None:
        self._connection: Any = None
        self._cut = False

    def use(self, connection: Any) -> None:
        """On the thread of the call, before and after it connects. Raises Left."""
        with _lock:
            if self._cut:
                raise Left
            self._connection = connection
            connection.line = self

    def release(self) -> None:
        """On the thread of the call: from now on the connection may be another call's."""
        with _lock:
            self._connection = None

    def cut(self) -> None:
        """From any thread; what blocks on the connection fails at once."""
        with _lock:
            self._cut = True
            wire = getattr(self._connection, "sock", None)
            # A connection goes back to the pool a moment before its call says so.
            if isinstance(wire, socket.socket) and self._connection.line is self:
                try:
                    # Of the plain socket: TLS would want to say goodbye, and its state belongs to the other thread.
                    socket.socket.shutdown(wire, socket.SHUT_RDWR)
                except OSError:
                    pass  # not connected any more

    @property
    def is_cut(self) -> bool:
        return self._cut


class _Known:
    """A connection that tells the call of its thread that it is used by it."""

    line: Line | None = None
    """Of the last call that used it."""

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self._tell()

    def request(self, *args: Any, **kwargs: Any) -> Any:
        self._tell()
        return super().request(*args, **kwargs)  # type: ignore[misc]

    def _tell(self) -> None:
        line: Line | None = getattr(_calls, "line", None)
        if line is not None:
            line.use(self)


class _Connection(_Known, AWSHTTPConnection):  # type: ignore[misc]
    pass


class _SecureConnection(_Known, AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _Pool(AWSHTTPConnectionPool):  # type: ignore[misc]
    ConnectionCls = _Connection


class _SecurePool(AWSHTTPSConnectionPool):  # type: ignore[misc]
    ConnectionCls = _SecureConnection


class Connections:
    """The HTTP connections of a client.

    botocore has no public way to them. Should its insides change, answers that are left keep their
    connection until the SDK's own time limit, and there are no numbers: `found` says so.
    """

    def __init__(self, client: Any) -> None:
        session = getattr(getattr(client, "_endpoint", None), "http_session", None)
        self._manager = getattr(session, "_manager", None)
        self.found = self._manager is not None
        if self._manager is not None:
            self._manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}

    def counts(self) -> tuple[int, int]:
        """Connections opened and requests sent so far."""
        opened = sent = 0
        pools: Any = getattr(self._manager, "pools", {})
        for key in list(pools.keys()):
            pool = pools.get(key)
            opened += getattr(pool, "num_connections", 0)
            sent += getattr(pool, "num_requests", 0)
        return opened, sent


async def call(executor: Executor, work: Callable[[], T]) -> T:
    """The outcome of blocking work. When the caller leaves, its connection is cut."""
    line = Line()

    def run() -> T:
        _calls.line = line
        try:
            if line.is_cut:
                raise Left
            return work()
        finally:
            line.release()
            _calls.line = None

    try:
        return await asyncio.get_running_loop().run_in_executor(executor, run)
    finally:
        line.cut()


async def stream(executor: Executor, open_: Callable[[], Iterable[T]]) -> AsyncGenerator[T, None]:
    """The items of what `open_` returns, which has `close`. When the caller leaves, the connection is cut."""
    loop = asyncio.get_running_loop()
    line = Line()
    room = threading.Semaphore(_AHEAD)
    items: asyncio.Queue[T | None] = asyncio.Queue()

    def tell(item: T | None) -> None:
        try:
            loop.call_soon_threadsafe(items.put_nowait, item)
        except RuntimeError:
            raise Left from None  # the loop is closed

    def run() -> None:
        _calls.line = line
        found: Any = None
        whole = False
        try:
            if line.is_cut:
                raise Left
            found = open_()
            for item in found:
                room.acquire()
                if line.is_cut:
                    raise Left
                tell(item)
            whole = True
        finally:
            line.release()
            _calls.line = None
            if found is not None and not whole:
                found.close()  # not read to its end: this connection cannot be used again
            tell(None)

    work = loop.run_in_executor(executor, run)
    try:
        while (item := await items.get()) is not None:
            room.release()
            yield item
        await work  # raises what went wrong
    finally:
        line.cut()
        room.release()
        work.cancel()
        work.add_done_callback(_look_at)


def _look_at(work: asyncio.Future[None]) -> None:
    """Nobody asks how work ended that was left."""
    if not work.cancelled():
        work.exception()
