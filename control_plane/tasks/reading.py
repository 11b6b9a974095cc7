"""What clients ask: tasks, pages, events, counts. Operations on a connection that sees one moment."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, bindparam, func, literal_column, select, union_all

from control_plane.domain.model import ModelName, Provider, ServerId
from control_plane.domain.task import TaskType
from control_plane.tasks import schema
from control_plane.tasks.lane_rows import FIRST_IN_LANE, in_lane
from control_plane.tasks.model import (
    COUNTER_BITS,
    AttemptRecord,
    EventRecord,
    EventType,
    Filter,
    FullTask,
    LaneId,
    TaskId,
    TaskRecord,
    TaskState,
    Tenant,
)
from control_plane.tasks.rows import TaskRow, all_columns, row_of
from control_plane.tasks.transitions import unknown_task

_WINDOW = 10_000
"""Events that one call looks at: those of others cost time too."""

_STATES = (schema.LATER, *TaskState)

_ONE = all_columns().where(schema.tasks.c.id == bindparam("id"))


def task(connection: Connection, tenant: Tenant, id: TaskId) -> TaskRow:
    """Raises UNKNOWN_TASK."""
    found = connection.execute(_ONE, {"id": id}).first()
    row = row_of(found) if found else None
    if row is None or row.tenant != tenant:
        raise unknown_task(id)
    return row


def full_task(connection: Connection, tenant: Tenant, id: TaskId) -> FullTask:
    """Raises UNKNOWN_TASK."""
    row = task(connection, tenant, id)
    spec = connection.execute(select(schema.payloads.c.spec).where(schema.payloads.c.task_id == id)).scalar_one()
    result = None
    if row.state == TaskState.SUCCEEDED:
        query = select(schema.results.c.result).where(schema.results.c.task_id == id)
        result = connection.execute(query).scalar_one()
    tried = connection.execute(
        select(schema.attempts).where(schema.attempts.c.task_id == id).order_by(schema.attempts.c.number)
    )
    told = connection.execute(select(schema.events).where(schema.events.c.task_id == id).order_by(schema.events.c.id))
    return FullTask(
        record=row.record,
        spec=bytes(spec),
        attempts=tuple(_attempt(attempt) for attempt in tried),
        history=tuple(_event(event) for event in told),
        result=None if result is None else bytes(result),
        lane_id=LaneId(row.lane_id),
    )


def page(connection: Connection, tenant: Tenant, filter: Filter, limit: int, before: TaskId | None) -> list[TaskRecord]:
    """Newest first. Walks an index in the order of ids: that of the key, of the group, or of each state."""
    tasks = schema.tasks
    conditions: list[ColumnElement[bool]] = [tasks.c.tenant == tenant]
    if before is not None:
        conditions.append(tasks.c.id < before)
    if filter.task_types:
        conditions.append(tasks.c.task_type.in_([int(type) for type in filter.task_types]))
    if filter.created_after is not None:
        # Ids grow with time: what is older is not looked at.
        conditions += [tasks.c.created_at >= filter.created_after, tasks.c.id >= least_id(filter.created_after)]
    if filter.created_before is not None:
        conditions.append(tasks.c.created_at < filter.created_before)
    states = _codes(filter.states)
    if filter.group or filter.idempotency_key:
        if filter.group:
            conditions.append(tasks.c.group_name == filter.group)
        if filter.idempotency_key:
            conditions.append(tasks.c.idempotency_key == filter.idempotency_key)
        query: Any = all_columns().where(*conditions, tasks.c.state.in_(states))
    else:
        newest = [
            select(all_columns().where(*conditions, tasks.c.state == state).order_by(tasks.c.id.desc()).limit(limit)
                   .subquery())
            for state in states
        ]  # fmt: skip
        query = union_all(*newest) if len(newest) > 1 else newest[0]
    query = _ordered(query, limit)
    return [row_of(row).record for row in connection.execute(query)]


def least_id(at: float) -> str:
    """No task that was submitted at this time or later has an id before this one. See `intake.Ids`."""
    return f"{max(0, int(at * 1000)) << COUNTER_BITS:020x}"


def _ordered(query: Any, limit: int) -> Any:
    if isinstance(query, Select):
        return query.order_by(literal_column("id").desc()).limit(limit)
    together = query.subquery()
    return select(together).order_by(together.c.id.desc()).limit(limit)


def _codes(states: tuple[TaskState, ...]) -> list[int]:
    """Numbers in the table. QUEUED has two."""
    wanted = {int(state) for state in states} or {int(state) for state in _STATES}
    return sorted(wanted | {schema.LATER}) if TaskState.QUEUED in wanted else sorted(wanted)


def counts(connection: Connection, tenant: Tenant) -> dict[TaskState, int]:
    """Tasks by state; a state without tasks has 0."""
    tasks = schema.tasks
    query = select(tasks.c.state, func.count()).where(tasks.c.tenant == tenant).group_by(tasks.c.state)
    found = dict.fromkeys(TaskState, 0)
    for state, count in connection.execute(query):
        found[TaskState.QUEUED if state == schema.LATER else TaskState(state)] += count
    return found


def waiting_count(connection: Connection, lane: LaneId, most: int) -> int:
    some = select(schema.tasks.c.id).where(*in_lane(lane)).order_by(*FIRST_IN_LANE).limit(most).subquery()
    return int(connection.execute(select(func.count()).select_from(some)).scalar_one())


def last_event_id(connection: Connection) -> int:
    return int(connection.execute(select(schema.counters.c.events)).scalar_one())


def events(
    connection: Connection,
    tenant: Tenant,
    after: int,
    limit: int,
    task_id: TaskId | None,
    filter: Filter | None,
    typed: bool = False,
) -> tuple[list[EventRecord], int]:
    """Events after a position, and the position up to which was looked. `typed`: with the kind of work.

    Raises UNKNOWN_TASK if a task is named that is not there.
    """
    table = schema.events
    newest = last_event_id(connection)
    query = select(table).where(table.c.id > after, table.c.tenant == tenant).order_by(table.c.id).limit(limit)
    if task_id is not None:
        task(connection, tenant, task_id)
        query, end = query.where(table.c.task_id == task_id), newest
    else:
        end = min(newest, after + _WINDOW)
        query = query.where(table.c.id <= end)
    if filter is not None:
        query = _filtered(query, filter)
    if typed:
        tasks = schema.tasks
        kind = select(tasks.c.task_type).where(tasks.c.id == table.c.task_id).scalar_subquery()
        query = query.add_columns(kind.label("task_type"))
    found = [_event(row, typed) for row in connection.execute(query)]
    return found, found[-1].id if len(found) == limit and found else max(after, end)


def _filtered(query: Select[Any], filter: Filter) -> Select[Any]:
    table, tasks = schema.events, schema.tasks
    if filter.states:
        query = query.where(table.c.state.in_([int(state) for state in filter.states]))
    if filter.group:
        query = query.where(table.c.group_name == filter.group)
    about_task: list[ColumnElement[bool]] = []
    if filter.task_types:
        about_task.append(tasks.c.task_type.in_([int(type) for type in filter.task_types]))
    if filter.idempotency_key:
        about_task.append(tasks.c.idempotency_key == filter.idempotency_key)
    if filter.created_after is not None:
        about_task.append(tasks.c.created_at >= filter.created_after)
    if filter.created_before is not None:
        about_task.append(tasks.c.created_at < filter.created_before)
    if about_task:
        query = query.join(tasks, tasks.c.id == table.c.task_id).where(*about_task)
    return query


def _attempt(row: Any) -> AttemptRecord:
    return AttemptRecord(
        number=row.number,
        epoch=row.epoch,
        server_id=ServerId(row.server_id),
        instance_id=row.instance_id,
        model=ModelName(row.model),
        provider=Provider(row.provider),
        started_at=row.started_at,
        ended_at=row.ended_at,
        failure_reason=row.failure_reason,
        failure_message=row.failure_message,
        cost_nano_usd=row.cost_nano_usd,
    )


def _event(row: Any, typed: bool = False) -> EventRecord:
    return EventRecord(
        id=row.id,
        task_id=TaskId(row.task_id),
        at=row.at,
        type=EventType(row.type),
        state=TaskState(row.state),
        epoch=row.epoch,
        attempt=row.attempt,
        server_id=row.server_id,
        model=row.model,
        provider=row.provider,
        reason=row.reason,
        message=row.message,
        group=row.group_name,
        task_type=TaskType(row.task_type) if typed and row.task_type is not None else None,
    )
