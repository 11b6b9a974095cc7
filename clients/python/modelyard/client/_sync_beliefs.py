"""Beliefs and callbacks, for code without asyncio: `Client.beliefs`, `Client.callbacks`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from modelyard.client._belief_types import Belief, CallbackDelivery, Json
from modelyard.client._beliefs import AsyncBeliefs, AsyncCallbacks
from modelyard.client._service import PATIENCE

if TYPE_CHECKING:
    from modelyard.client._sync import Client


class Beliefs:
    """What is held to be true. Arguments and methods as AsyncBeliefs, without await.

    client.beliefs.put("weather/berlin", {"sky": "grey"}, confidence=0.8, source="station-7")
    print(client.beliefs.get("weather/berlin").value)
    """

    def __init__(self, client: Client, beliefs: AsyncBeliefs) -> None:
        self._client = client
        self._beliefs = beliefs

    def put(
        self,
        key: str,
        value: Json,
        *,
        confidence: float = 1.0,
        source: str = "",
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Belief:
        """Write a fact over whatever was there; it is on disk when this returns."""
        return self._client._run(
            self._beliefs.put(key, value, confidence=confidence, source=source, timeout=timeout, retries=retries)
        )

    def get(self, key: str, *, timeout: float | None = None) -> Belief:
        """One fact; raises UnknownBelief."""
        return self._client._run(self._beliefs.get(key, timeout=timeout))

    def list(
        self, prefix: str = "", *, limit: int | None = None, page_size: int = 100, timeout: float | None = None
    ) -> Iterator[Belief]:
        """Facts whose keys begin with a prefix, by key, at most `limit`; read in pages."""
        return self._client._each(self._beliefs.list(prefix, limit=limit, page_size=page_size, timeout=timeout))

    def delete(self, key: str, *, timeout: float | None = None) -> None:
        """Forget a fact. Raises UnknownBelief."""
        self._client._run(self._beliefs.delete(key, timeout=timeout))

    def watch(self, prefix: str = "", *, after: int | None = None, patience: float = PATIENCE) -> Iterator[Belief]:
        """Facts whose keys begin with a prefix, as they are written or deleted, without end. Without `after` (a
        version) only those from now on; 0: all that are known first."""
        return self._client._each(self._beliefs.watch(prefix, after=after, patience=patience))


class Callbacks:
    """What became of the callbacks of durable tasks. Arguments and methods as AsyncCallbacks, without await."""

    def __init__(self, client: Client, callbacks: AsyncCallbacks) -> None:
        self._client = client
        self._callbacks = callbacks

    def list(
        self,
        *,
        states: str | Sequence[str] = (),
        task_id: str | None = None,
        limit: int | None = None,
        page_size: int = 100,
        timeout: float | None = None,
    ) -> Iterator[CallbackDelivery]:
        """Callbacks, those of the newest tasks first, at most `limit`; read in pages."""
        return self._client._each(
            self._callbacks.list(states=states, task_id=task_id, limit=limit, page_size=page_size, timeout=timeout)
        )

    def resend(self, id: str, *, timeout: float | None = None) -> CallbackDelivery:
        """Send a callback again, at once and with its full number of attempts. Raises UnknownTask if there is none."""
        return self._client._run(self._callbacks.resend(id, timeout=timeout))
