"""Whether the server takes requests, and who wants to hear when that changes."""

from __future__ import annotations

import asyncio


class Changes:
    """A version that grows; waiting for it never misses a change and never queues any."""

    def __init__(self) -> None:
        self.version = 0
        self._event = asyncio.Event()

    def tell(self) -> None:
        self.version += 1
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def beyond(self, version: int) -> int:
        """Wait until the version is greater; returns it."""
        while self.version <= version:
            await self._event.wait()
        return self.version


class Lifecycle:
    """Serving, or draining because a control plane ordered it or the process is stopping.

    Each control plane's order stands until that one takes it back: a stream that breaks does
    not put a drained server to work again.
    """

    def __init__(self) -> None:
        self.changes = Changes()
        self.stopping = False
        self._drained_by: set[str] = set()

    @property
    def draining(self) -> bool:
        return self.stopping or bool(self._drained_by)

    def order(self, control_plane: str, *, drain: bool) -> None:
        """A control plane's wish, repeated with each of its directives."""
        if drain is (control_plane in self._drained_by):
            return
        if drain:
            self._drained_by.add(control_plane)
        else:
            self._drained_by.discard(control_plane)
        self.changes.tell()

    def stop(self) -> None:
        """The process is on its way out; there is no way back."""
        if not self.stopping:
            self.stopping = True
            self.changes.tell()
