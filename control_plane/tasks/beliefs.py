"""Facts by key: what is held to be true, by whom, and how surely. Values are JSON texts here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from control_plane.tasks.model import Changes, Tenant

TASKS_PREFIX = "tasks/"
"""Keys that only the control plane writes: the final states of tasks."""


@dataclass(frozen=True, slots=True)
class BeliefRecord:
    """A fact, or that there was one."""

    key: str
    value: str
    """JSON; empty if it was deleted."""
    confidence: float
    """[0, 1]"""
    source: str
    updated_at: float
    """Seconds since the epoch by the store's clock."""
    version: int
    """Grows with every write of any fact; what becomes visible later has a greater one."""
    deleted: bool = False


class BeliefStore(Protocol):
    """Facts in a database. What a method has returned is on disk.

    Every method raises DomainError STORE_UNAVAILABLE when the database does not answer, and a writing one STORE_FULL
    when its disk is full.
    """

    def listen(self, told: Callable[[Changes], None]) -> Callable[[], None]:
        """Be told of changes (`Changes.beliefs`), on the event loop. Call what is returned to stop."""
        ...

    async def put_belief(
        self, tenant: Tenant, key: str, value: str, confidence: float, source: str
    ) -> BeliefRecord: ...

    async def belief(self, tenant: Tenant, key: str) -> BeliefRecord:
        """Raises UNKNOWN_BELIEF."""
        ...

    async def delete_belief(self, tenant: Tenant, key: str) -> None:
        """Leaves a record of the deletion for those who watch. Raises UNKNOWN_BELIEF."""
        ...

    async def beliefs(self, tenant: Tenant, prefix: str, limit: int, after_key: str = "") -> list[BeliefRecord]:
        """Facts whose keys begin with a prefix, by key, those after a key."""
        ...

    async def beliefs_since(
        self, tenant: Tenant, prefix: str, after: int, limit: int
    ) -> tuple[list[BeliefRecord], int]:
        """Latest facts and deletions of greater versions, by version, and the version up to which was looked
        (>= after): facts that do not match count as seen."""
        ...

    async def last_version(self) -> int: ...
