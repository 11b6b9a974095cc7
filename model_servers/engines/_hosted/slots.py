"""How many requests the provider gets at the same time."""

from __future__ import annotations

import asyncio

from model_servers.engine import Busy


class Slots:
    """At most `size` holders; up to `max_waiting` others wait, first come, first served."""

    def __init__(self, size: int, max_waiting: int) -> None:
        self.size = size
        self.running = 0
        self.waiting = 0
        self._max_waiting = max_waiting
        self._free = asyncio.Semaphore(size)

    async def acquire(self) -> None:
        """Raises Busy."""
        if self._free.locked() and self.waiting >= self._max_waiting:
            raise Busy(f"{self.size} slots and {self._max_waiting} waiting places are taken")
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1

    def release(self) -> None:
        self.running -= 1
        self._free.release()
