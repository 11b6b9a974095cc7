"""As many requests at a time as there are slots; the others wait in order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from model_servers.engine import EngineFailed


class Slots:
    def __init__(self, size: int) -> None:
        self.size = size
        self.running = 0
        self.waiting = 0
        self._free = asyncio.Semaphore(size)
        self._closed = False

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Raises EngineFailed once closed."""
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            if self._closed:
                raise EngineFailed("the engine was closed")
            yield
        finally:
            self.running -= 1
            self._free.release()

    def close(self) -> None:
        """Whoever waits or comes later fails: one is let in, and each that fails lets the next one in."""
        if not self._closed:
            self._closed = True
            self._free.release()
