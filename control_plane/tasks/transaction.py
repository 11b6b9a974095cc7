"""One transaction of the writer: what is applied in it, and what it adds besides the rows of its commands.

Sync on a SQLAlchemy connection: the engine decides whether that is a thread or a greenlet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, bindparam, update

from control_plane.tasks import bulk, schema
from control_plane.tasks.faults import Fault, fault_of
from control_plane.tasks.model import Changes, LaneId, TaskId

C = TypeVar("C")
R = TypeVar("R")

_DELIVERIES = tuple(column.name for column in schema.deliveries.columns)
_BELIEFS = tuple(column.name for column in schema.beliefs.columns)
_EVENTS = tuple(column.name for column in schema.events.columns)

_TAKE = (
    update(schema.counters)
    .values(
        events=schema.counters.c.events + bindparam("more_events"),
        beliefs=schema.counters.c.beliefs + bindparam("more_beliefs"),
    )
    .returning(schema.counters.c.events, schema.counters.c.beliefs)
)


@dataclass
class ChangeSet:
    """Changes, while they are being collected."""

    lanes: set[LaneId] = field(default_factory=set)
    returned: set[LaneId] = field(default_factory=set)
    ended: set[tuple[TaskId, int]] = field(default_factory=set)
    events: bool = False
    deliveries: bool = False
    beliefs: bool = False

    def frozen(self) -> Changes:
        return Changes(
            frozenset(self.lanes),
            frozenset(self.returned),
            frozenset(self.ended),
            self.events,
            self.deliveries,
            self.beliefs,
        )

    def __bool__(self) -> bool:
        return bool(self.lanes or self.ended or self.events or self.deliveries or self.beliefs)


class Transaction:
    """What commands write in. Rows for `events`, `beliefs` and `deliveries` are tuples in the order of the table's
    columns, those of events and beliefs without their number (`id`, `version`): they are numbered and written together
    at the end."""

    def __init__(self, connection: Connection, now: float) -> None:
        self.connection = connection
        self.now = now
        """Seconds since the epoch by the store's clock."""
        self.changes = ChangeSet()
        self.events: list[tuple[Any, ...]] = []
        self.beliefs: dict[tuple[str, str], tuple[Any, ...]] = {}
        """By tenant and key: tenant, key, value (JSON), confidence, source, deleted."""
        self.deliveries: list[tuple[Any, ...]] = []
        self.after_commit: list[Callable[[], None]] = []
        """Called in the writer when everything is on disk; must not raise."""

    def believe(
        self, tenant: str, key: str, value: str, confidence: float = 1.0, source: str = "", deleted: bool = False
    ) -> None:
        """Write a fact when the transaction ends; the last of several for one key holds. `value` is JSON."""
        self.beliefs[tenant, key] = (tenant, key, value, confidence, source, deleted)

    def comes_back(self, lane: LaneId) -> None:
        """A task of this lane, which is not new, can start now."""
        self.changes.lanes.add(lane)
        self.changes.returned.add(lane)

    def forget(self, task_id: TaskId) -> None:
        """Drop what was to be written about a task that is deleted in the same transaction."""
        self.events = [row for row in self.events if row[0] != task_id]
        self.deliveries = [row for row in self.deliveries if row[1] != task_id]

    def numbers(self, events: int = 0, beliefs: int = 0) -> tuple[int, int]:
        """The first of so many new numbers of events, and of versions of beliefs.

        From here to the end of the transaction no other replica can take any: lock nothing after this that another
        transaction may hold that wants numbers too.
        """
        row = self.connection.execute(_TAKE, {"more_events": events, "more_beliefs": beliefs}).one()
        return row.events - events + 1, row.beliefs - beliefs + 1

    def complete(self) -> None:
        """Write what was collected."""
        connection = self.connection
        if self.deliveries:
            bulk.insert(connection, schema.deliveries, _DELIVERIES, self.deliveries)
            self.changes.deliveries = True
        if not self.events and not self.beliefs:
            return
        event, version = self.numbers(len(self.events), len(self.beliefs))
        if self.events:
            bulk.insert(connection, schema.events, _EVENTS, [(event + i, *row) for i, row in enumerate(self.events)])
            self.changes.events = True
        if self.beliefs:
            rows = [
                (tenant, key, value, confidence, source, self.now, version + i, deleted)
                for i, (tenant, key, value, confidence, source, deleted) in enumerate(self.beliefs.values())
            ]
            bulk.upsert(connection, schema.beliefs, _BELIEFS, ("tenant", "key"), rows)
            self.changes.beliefs = True
        self.events, self.beliefs, self.deliveries = [], {}, []


@dataclass(frozen=True, eq=False)
class Batch(Generic[C, R]):
    """Commands of one kind, which are applied together."""

    name: str
    rank: int
    """Kinds with a lower one are applied before it, in the same transaction."""
    apply: Callable[[Transaction, Sequence[C]], Sequence[R | Exception]]
    """One result for each command, in their order; an exception is raised to the caller of that command and harms no
    other. What it raises itself undoes the whole transaction; then the commands are tried one by one."""


@dataclass(eq=False)
class Job:
    """A command that waits for its transaction."""

    batch: Batch[Any, Any]
    command: Any
    future: asyncio.Future[Any]
    outcome: Any = None
    """A result, or an exception for its caller."""


def _each(transaction: Transaction, operations: Sequence[Callable[[Transaction], Any]]) -> list[Any]:
    """Operations of any kind. One that raises is undone alone, unless the database is what failed."""
    outcomes: list[Any] = []
    for operation in operations:
        kept = (len(transaction.events), dict(transaction.beliefs), len(transaction.deliveries))
        point = transaction.connection.begin_nested()
        try:
            outcomes.append(operation(transaction))
        except Exception as error:
            if not point.is_active or fault_of(error) is not Fault.COMMAND:
                raise
            point.rollback()
            events, transaction.beliefs, deliveries = kept
            del transaction.events[events:], transaction.deliveries[deliveries:]
            outcomes.append(error)
        else:
            point.commit()
    return outcomes


OPERATION: Batch[Callable[[Transaction], Any], Any] = Batch("operation", 90, _each)


def apply(transaction: Transaction, jobs: Sequence[Job]) -> None:
    """Apply commands, those of one kind together, and set their outcomes."""
    kinds: dict[Batch[Any, Any], list[Job]] = {}
    for job in jobs:
        kinds.setdefault(job.batch, []).append(job)
    for batch in sorted(kinds, key=lambda kind: kind.rank):
        alike = kinds[batch]
        outcomes = batch.apply(transaction, [job.command for job in alike])
        for job, outcome in zip(alike, outcomes, strict=True):
            job.outcome = outcome
    transaction.complete()
