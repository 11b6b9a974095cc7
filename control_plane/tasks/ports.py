"""What the dispatcher and the API ask of a store, and the dispatcher of whoever runs an attempt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from control_plane.domain.learned import Learned
from control_plane.fleet.grants import Grant
from control_plane.tasks.model import (
    Changes,
    Claim,
    EventRecord,
    Filter,
    FullTask,
    LaneId,
    NewTask,
    Placement,
    Retry,
    Submitted,
    TaskId,
    TaskRecord,
    TaskState,
    Tenant,
    WaitingLane,
)


class TaskStore(Protocol):
    """Tasks in a database. What a method has returned is on disk.

    Every method raises DomainError STORE_UNAVAILABLE when the database does not answer, and a writing one STORE_FULL
    when its disk is full; nothing is written then, unless the connection broke during the very commit. Methods for
    one task raise UNKNOWN_TASK for one that does not exist or belongs to another tenant.
    """

    def now(self) -> float:
        """Seconds since the epoch by the store's clock, which never jumps back while this process runs."""
        ...

    def listen(self, told: Callable[[Changes], None]) -> Callable[[], None]:
        """Be told of changes, on the event loop, after they were committed. Call what is returned to stop."""
        ...

    # -------------------------------------------------------- for clients ---

    async def submit(self, task: NewTask) -> Submitted:
        """Write a task. Raises IdempotencyConflict."""
        ...

    async def get(self, tenant: Tenant, id: TaskId) -> FullTask: ...

    async def page(self, tenant: Tenant, filter: Filter, limit: int, before: TaskId | None = None) -> list[TaskRecord]:
        """Newest first, those older than `before`."""
        ...

    async def events(
        self,
        tenant: Tenant,
        after: int,
        limit: int,
        task_id: TaskId | None = None,
        filter: Filter | None = None,
        *,
        typed: bool = False,
    ) -> tuple[list[EventRecord], int]:
        """Events after a position, oldest first, and the position up to which was looked (>= after): events that do
        not match count as seen. `typed`: with the kind of work of their task."""
        ...

    async def last_event_id(self) -> int: ...

    async def cancel(self, tenant: Tenant, id: TaskId) -> TaskRecord:
        """Raises WRONG_STATE if it has ended in another way."""
        ...

    async def retry(self, tenant: Tenant, id: TaskId) -> TaskRecord:
        """Raises WRONG_STATE unless it failed, expired or was cancelled."""
        ...

    async def delete(self, tenant: Tenant, id: TaskId) -> None:
        """Raises WRONG_STATE unless it is terminal."""
        ...

    async def counts(self, tenant: Tenant) -> dict[TaskState, int]: ...

    async def waiting_count(self, lane: LaneId, most: int) -> int:
        """Tasks of a lane that can start now, counted up to `most`."""
        ...

    # ----------------------------------------------------- for dispatchers ---

    async def waiting_lanes(self, among: Collection[LaneId] | None = None) -> list[WaitingLane]:
        """Every lane with tasks that can start now; with `among` only those of these."""
        ...

    async def claim(self, lane: LaneId, placements: Sequence[Placement]) -> list[Claim]:
        """Take the first tasks of a lane, one for each placement, in that order; fewer if there are fewer. A task is
        SCHEDULED then, its epoch is one more and belongs to this dispatcher as long as its lease holds. The last one
        says whether the lane has more."""
        ...

    async def started(self, id: TaskId, epoch: int) -> bool:
        """It was sent: RUNNING. False: the epoch is not valid any more."""
        ...

    async def succeeded(self, id: TaskId, epoch: int, result: bytes, cost_nano_usd: int) -> bool:
        """Record the one result. False: the epoch is not valid any more, nothing was written."""
        ...

    async def attempt_failed(self, id: TaskId, epoch: int, reason: str, message: str, retry: Retry | None) -> bool:
        """Queue it again, or without `retry` fail it for good. False as above."""
        ...

    async def expired(self, id: TaskId, epoch: int) -> bool:
        """Its deadline passed while it was in hand. False as above."""
        ...

    async def give_back(self, id: TaskId, epoch: int, reason: str) -> bool:
        """Queue it again at once; the attempt does not count as failed. False as above."""
        ...

    async def heartbeat(self) -> None:
        """Renew the lease of this dispatcher, and find out which tasks were taken away from it."""
        ...

    async def learned(self) -> list[Learned]:
        """What was last kept by `keep_learned`."""
        ...

    async def keep_learned(self, learned: Sequence[Learned]) -> None:
        """Keep what was learned of these pairs over what is kept of them."""
        ...

    async def knowledge(self) -> dict[str, str]:
        """What was last kept by `keep_knowledge`, but for what is very old."""
        ...

    async def keep_knowledge(self, entries: Mapping[str, str]) -> None:
        """Keep what predictors know, JSON by name, over what is kept under these names."""
        ...

    async def sweep(self) -> None:
        """Let time pass: what is due becomes startable, what is over expires, what dispatchers left behind whose
        lease ran out is queued again (or fails, if that happened too often), what was kept long enough is purged."""
        ...


class Executor(Protocol):
    """Runs one attempt of a task on a server."""

    async def run(self, claim: Claim, grant: Grant, timeout: float) -> tuple[bytes, int]:
        """The serialised TaskResult and its cost in 1e-9 US dollars. Always releases the grant, with the outcome.

        `timeout` in seconds: until the task's deadline. Raises DomainError with a reason of the contract. Cancelling
        stops the engine.
        """
        ...


class Dispatching(Protocol):
    """What the API tells of the dispatcher of this process."""

    @property
    def running_here(self) -> int:
        """Tasks in hand."""
        ...

    @property
    def workers(self) -> int:
        """Tasks that may be in hand at the same time."""
        ...

    def waiting_for(self, lane: LaneId) -> str:
        """Why the first task of a lane has not started, one sentence for people; empty if nobody knows."""
        ...
