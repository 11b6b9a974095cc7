"""Rows of tasks in a transaction: read and locked together, changed in memory, written together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, select

from control_plane.domain.task import Priority, TaskType
from control_plane.tasks import bulk, schema
from control_plane.tasks.model import EventType, TaskId, TaskRecord, TaskState, Tenant
from control_plane.tasks.transaction import Transaction

COLUMNS = tuple(column.name for column in schema.tasks.columns)
_CHANGING = (
    "state", "lane_id", "epoch", "attempts", "failures", "lost", "owner", "server_id", "model", "provider",
    "updated_at", "finished_at", "ready_at", "deadline", "failure_reason", "failure_message",
)  # fmt: skip
_ATTEMPT_END = ("ended_at", "failed", "failure_reason", "failure_message", "cost_nano_usd")


@dataclass(slots=True)
class TaskRow:
    """A row of `tasks`, its fields in the order of the columns."""

    id: TaskId
    tenant: Tenant
    state: int
    """A TaskState, or LATER."""
    lane_id: int
    home_lane_id: int
    priority: int
    task_type: int
    group_name: str | None
    idempotency_key: str | None
    callback_url: str | None
    epoch: int
    attempts: int
    failures: int
    lost: int
    max_attempts: int
    owner: str | None
    server_id: str
    model: str
    provider: str
    created_at: float
    updated_at: float
    finished_at: float | None
    ready_at: float | None
    deadline: float | None
    failure_reason: str
    failure_message: str

    @property
    def shown_state(self) -> TaskState:
        return TaskState.QUEUED if self.state == schema.LATER else TaskState(self.state)

    @property
    def record(self) -> TaskRecord:
        return TaskRecord(
            id=self.id,
            tenant=self.tenant,
            state=self.shown_state,
            priority=Priority(self.priority),
            task_type=TaskType(self.task_type),
            group=self.group_name or "",
            idempotency_key=self.idempotency_key or "",
            epoch=self.epoch,
            attempts=self.attempts,
            failures=self.failures,
            max_attempts=self.max_attempts,
            created_at=self.created_at,
            updated_at=self.updated_at,
            finished_at=self.finished_at,
            ready_at=self.ready_at if self.state == schema.LATER else None,
            deadline=self.deadline,
            failure_reason=self.failure_reason,
            failure_message=self.failure_message,
        )

    def values(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in COLUMNS])


def row_of(row: Row[Any]) -> TaskRow:
    return TaskRow(*tuple(row))


def all_columns() -> Select[Any]:
    return select(schema.tasks)


def rows_of(connection: Connection, ids: Iterable[TaskId]) -> dict[TaskId, TaskRow]:
    """The tasks with these ids, locked until the transaction ends."""
    wanted = sorted(set(ids))  # in one order everywhere, so that no two transactions wait for each other
    query = all_columns().where(bulk.among(connection, schema.tasks.c.id, wanted))
    if connection.dialect.name != "sqlite":
        query = query.order_by(schema.tasks.c.id).with_for_update()
    return {row.id: row_of(row) for row in connection.execute(query)}


@dataclass
class Work:
    """Tasks that are being changed in a transaction."""

    transaction: Transaction
    rows: dict[TaskId, TaskRow]
    max_lost: int
    epochs: dict[TaskId, int] = field(init=False)
    """As they are in the database."""
    changed: dict[TaskId, TaskRow] = field(default_factory=dict)
    results: list[tuple[TaskId, bytes]] = field(default_factory=list)
    ended: dict[tuple[TaskId, int], tuple[Any, ...]] = field(default_factory=dict)
    """Attempts, by task and number: when, whether it failed, reason, message, cost."""
    deleted: list[TaskId] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.epochs = {id: row.epoch for id, row in self.rows.items()}

    @property
    def now(self) -> float:
        return self.transaction.now

    def event(self, row: TaskRow, type: EventType, reason: str = "", message: str = "", attempt: bool = True) -> None:
        """Note what has happened; `attempt`: to the latest attempt."""
        self.transaction.events.append(event_of(row, self.now, type, reason, message, attempt))

    def write(self) -> None:
        """Write rows, attempts, results; delete what is to go."""
        connection = self.transaction.connection
        if self.changed:
            write_rows(connection, [(self.epochs[id], row) for id, row in sorted(self.changed.items())])
        if self.ended:
            rows = [(*key, *values) for key, values in self.ended.items()]
            bulk.update(connection, schema.attempts, ("task_id", "number"), _ATTEMPT_END, rows)
        if self.results:
            bulk.insert(connection, schema.results, ("task_id", "result"), self.results)
        if self.deleted:
            delete_tasks(connection, self.deleted)


def event_of(
    row: TaskRow, now: float, type: EventType, reason: str = "", message: str = "", attempt: bool = True
) -> tuple[Any, ...]:
    """A row of `events` without its id."""
    has = attempt and row.attempts > 0
    return (
        row.id, row.tenant, now, int(type), int(row.shown_state), row.epoch,
        row.attempts if has else 0, row.server_id if has else "", row.model if has else "",
        row.provider if has else "", reason, message, row.group_name or "",
    )  # fmt: skip


def insert_rows(connection: Connection, rows: Sequence[TaskRow]) -> None:
    bulk.insert(connection, schema.tasks, COLUMNS, [row.values() for row in rows])


def write_rows(connection: Connection, rows: Sequence[tuple[int, TaskRow]]) -> None:
    """Rows as they are now, found by id and the epoch that they had."""
    values = [(row.id, epoch, *[getattr(row, name) for name in _CHANGING]) for epoch, row in rows]
    bulk.update(connection, schema.tasks, ("id", "epoch"), _CHANGING, values)


_ATTACHED = (
    schema.payloads.c.task_id, schema.results.c.task_id, schema.attempts.c.task_id, schema.events.c.task_id,
    schema.deliveries.c.task_id, schema.tasks.c.id,
)  # fmt: skip


def delete_tasks(connection: Connection, ids: Sequence[TaskId]) -> None:
    """Tasks and everything about them."""
    for column in _ATTACHED:
        connection.execute(delete(column.table).where(bulk.among(connection, column, list(ids))))
