"""Slots in order of arrival, and pauses that end early when the engine breaks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Slots:
    """At most `size` holders; the others wait, first come, first served."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.running = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        if self.running < self.size and not self._queue:
            self.running += 1
        else:
            await self._wait()
        try:
            yield
        finally:
            self._release()

    async def _wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._release()  # cancelled in the moment in which the slot was handed over
            elif turn in self._queue:
                self._queue.remove(turn)
            raise

    def _release(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)  # the slot passes on: `running` stays as it is
                return
        self.running -= 1

    def fail_waiting(self, error: Callable[[], Exception]) -> None:
        """Everyone who waits gets an error instead of a slot."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_exception(error())


class Pauses:
    """Sleeps that can all be ended early, in peace or with an error."""

    def __init__(self) -> None:
        self._asleep: set[asyncio.Future[None]] = set()

    async def sleep(self, seconds: float | None) -> None:
        """Sleep that long; None: until failed or cancelled."""
        loop = asyncio.get_running_loop()
        waking: asyncio.Future[None] = loop.create_future()
        timer = None if seconds is None else loop.call_later(seconds, _wake, waking)
        self._asleep.add(waking)
        try:
            await waking
        finally:
            if timer is not None:
                timer.cancel()
            self._asleep.discard(waking)

    def wake_all(self) -> None:
        for waking in tuple(self._asleep):
            _wake(waking)

    def fail_all(self, error: Callable[[], Exception]) -> None:
        for waking in tuple(self._asleep):
            if not waking.done():
                waking.set_exception(error())


def _wake(waking: asyncio.Future[None]) -> None:
    if not waking.done():
        waking.set_result(None)
