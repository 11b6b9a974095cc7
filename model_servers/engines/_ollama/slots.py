"""How many requests Ollama runs at once, which it does not tell, and a gate that admits that many."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

START = 2
"""Slots before anything is known: the least with which something can be learned."""

_LONG, _SHORT = 0.3, 0.03
"""Beside n others a place is free after about one n-th of what the work itself takes. A wait of that part of it is
clearly a queue, or clearly none; between them it is neither."""
_LEAST_LONG, _MOST_SHORT = 0.02, 0.01
"""Seconds: what is below or above them is a queue, or none, whatever the work takes."""
_FORGET = 50
"""After so many requests in a row that filled the slots and did not wait, one more is tried again."""


class SlotEstimate:
    """Infers slots from how long requests waited inside Ollama beside how many others.

    Ollama gives the duration of the whole request and of its parts (loading, prefill, decoding) with
    every answer; what is left over is time in its queue. A request that had to wait beside n others
    shows that there are at most n slots; one that did not wait shows n + 1. Without any such wait the
    estimate is one more than has been seen, so that the next busy moment tries it.

    What it cannot know: a wait caused by other users of the same Ollama, or by a long prefill of a
    neighbour in the same batch, looks like a queue. Such an error is unlearned after a while.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._proven = 0
        self._refuted: int | None = None
        self._calm = 0

    @property
    def slots(self) -> int:
        """Requests to send at the same time, at least 1."""
        found = max(START, self._proven + 1) if self._refuted is None else self._refuted - 1
        return max(1, min(found, self._most))

    def observe(self, beside: int, waited: float, worked: float) -> None:
        """One finished request.

        beside: others of the same model inside Ollama when it was sent. waited: seconds in Ollama's
        queue. worked: seconds of prefill and decoding; 0 (not known) teaches nothing.
        """
        at_once = beside + 1
        if worked <= 0:
            return
        typical = worked / at_once
        if waited >= max(_LONG * typical, _LEAST_LONG):
            if at_once > 1:  # alone and yet waiting: behind somebody else's request
                self._refuted = at_once if self._refuted is None else min(self._refuted, at_once)
                self._proven = min(self._proven, at_once - 1)
                self._calm = 0
        elif waited <= max(_SHORT * typical, _MOST_SHORT):
            self._proven = max(self._proven, at_once)
            if self._refuted is not None:
                self._calm = self._calm + 1 if at_once == self._refuted - 1 else self._calm
                if at_once >= self._refuted or self._calm >= _FORGET:
                    self._refuted, self._calm = None, 0


class Gate:
    """At most `size()` inside; the others wait, first come, first served."""

    def __init__(self, size: Callable[[], int]) -> None:
        self._size = size
        self._queue: deque[asyncio.Future[None]] = deque()
        self._closed: Callable[[], Exception] | None = None
        self.inside = 0

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def hold(self) -> AsyncGenerator[None, None]:
        """A place inside. Raises what `close` was given."""
        if self._closed is not None:
            raise self._closed()
        if self._queue or self.inside >= self._size():
            await self._wait()
        else:
            self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            self.admit()

    async def _wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.inside -= 1  # cancelled in the moment in which the place was handed over
                self.admit()
            elif turn in self._queue:
                self._queue.remove(turn)
            raise

    def admit(self) -> None:
        """Let in who fits: to be called when the size has grown."""
        while self._queue and self.inside < self._size():
            turn = self._queue.popleft()
            if not turn.done():
                self.inside += 1
                turn.set_result(None)

    def close(self, error: Callable[[], Exception]) -> None:
        """Everyone who waits, or comes later, gets an error."""
        self._closed = error
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_exception(error())
