"""Commands that the store applies many at a time: submit, change, claim."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import and_, bindparam, literal_column, select

from control_plane.domain.model import ModelName, ServerId
from control_plane.tasks import bulk, schema
from control_plane.tasks.lane_rows import FIRST_IN_LANE, Floors, Lanes, in_lane
from control_plane.tasks.model import (
    COUNTER_BITS,
    Claim,
    EventType,
    IdempotencyConflict,
    LaneId,
    NewTask,
    Placement,
    Submitted,
    TaskId,
    TaskState,
)
from control_plane.tasks.rows import TaskRow, Work, all_columns, event_of, insert_rows, row_of, rows_of, write_rows
from control_plane.tasks.schema import LATER
from control_plane.tasks.transaction import Transaction
from control_plane.tasks.transitions import Change, Outcome, expire

FailedModels = tuple[tuple[ServerId, ModelName, str], ...]

_RANDOM_BYTES = 6


class Ids:
    """Ids that grow: milliseconds since the epoch, a counter, something random; 32 hexadecimal digits.

    `last` is the greatest id in the database, so that ids grow even where the clock of an earlier process was ahead.
    """

    def __init__(self, last: TaskId | None = None) -> None:
        self._last = int(last[:20], 16) if last else 0

    def next(self, now: float) -> TaskId:
        self._last = max(self._last + 1, int(now * 1000) << COUNTER_BITS)
        return TaskId(f"{self._last:020x}{secrets.token_hex(_RANDOM_BYTES)}")


@dataclass(frozen=True, slots=True)
class ClaimCommand:
    lane: LaneId
    placements: tuple[Placement, ...]


@dataclass
class Intake:
    """What the commands of one store share. Used by its writer alone."""

    owner: str
    lanes: Lanes
    ids: Ids
    max_lost: int
    floors: Floors | None = None
    """For databases that need them."""

    # ------------------------------------------------------------- submit ---

    def submit(self, transaction: Transaction, tasks: Sequence[NewTask]) -> list[Submitted | Exception]:
        """Write tasks that are new; answer with what is there for those with a known idempotency key."""
        known = self._with_keys(transaction, tasks)
        lane_ids = self.lanes.ids(transaction, [task.lane for task in tasks])
        now = transaction.now
        rows: list[TaskRow] = []
        specs: list[tuple[TaskId, bytes]] = []
        outcomes: list[Submitted | Exception] = []
        for task in tasks:
            key = (task.tenant, task.idempotency_key)
            if task.idempotency_key and key in known:
                row, spec = known[key]
                same = spec == task.spec
                outcomes.append(Submitted(row.record, created=False) if same else IdempotencyConflict(row.id, spec))
                continue
            row = self._new(task, lane_ids[task.lane], now)
            known[key] = (row, task.spec)
            rows.append(row)
            specs.append((row.id, task.spec))
            outcomes.append(Submitted(row.record, created=True))
        if rows:
            # By key: two replicas that submit the same keys must not wait for each other.
            insert_rows(transaction.connection, sorted(rows, key=lambda row: (row.tenant, row.idempotency_key or "")))
            bulk.insert(transaction.connection, schema.payloads, ("task_id", "spec"), specs)
            transaction.events.extend(event_of(row, now, EventType.SUBMITTED) for row in rows)
            transaction.changes.lanes.update(LaneId(row.lane_id) for row in rows if row.state == TaskState.QUEUED)
        return outcomes

    def _new(self, task: NewTask, lane_id: int, now: float) -> TaskRow:
        later = task.not_before is not None and task.not_before > now
        return TaskRow(
            id=self.ids.next(now),
            tenant=task.tenant,
            state=LATER if later else int(TaskState.QUEUED),
            lane_id=lane_id,
            home_lane_id=lane_id,
            priority=int(task.lane.priority),
            task_type=int(task.task_type),
            group_name=task.group or None,
            idempotency_key=task.idempotency_key or None,
            callback_url=task.callback_url or None,
            epoch=0,
            attempts=0,
            failures=0,
            lost=0,
            max_attempts=task.max_attempts,
            owner=None,
            server_id="",
            model="",
            provider="",
            created_at=now,
            updated_at=now,
            finished_at=None,
            ready_at=task.not_before if later else None,
            deadline=task.deadline,
            failure_reason="",
            failure_message="",
        )

    @staticmethod
    def _with_keys(transaction: Transaction, tasks: Sequence[NewTask]) -> dict[tuple[str, str], tuple[TaskRow, bytes]]:
        keys: dict[str, set[str]] = {}
        for task in tasks:
            if task.idempotency_key:
                keys.setdefault(task.tenant, set()).add(task.idempotency_key)
        found: dict[tuple[str, str], tuple[TaskRow, bytes]] = {}
        connection, table = transaction.connection, schema.tasks
        for tenant, wanted in keys.items():
            there = and_(table.c.tenant == tenant, bulk.among(connection, table.c.idempotency_key, sorted(wanted)))
            rows = {row.id: row_of(row) for row in connection.execute(all_columns().where(there))}
            if rows:
                for id, spec in specs_of(transaction, list(rows)).items():
                    found[tenant, rows[id].idempotency_key or ""] = (rows[id], spec)
        return found

    # ------------------------------------------------------------- change ---

    def change(self, transaction: Transaction, changes: Sequence[Change]) -> list[Outcome]:
        """Apply changes to tasks, in their order."""
        work = Work(transaction, rows_of(transaction.connection, [change.id for change in changes]), self.max_lost)
        wanted = [lane for change in changes for lane in change.lanes()]
        lane_ids = self.lanes.ids(transaction, wanted) if wanted else {}
        outcomes = [change.apply(work.rows.get(change.id), work, lane_ids) for change in changes]
        work.write()
        return outcomes

    # -------------------------------------------------------------- claim ---

    def claim(self, transaction: Transaction, commands: Sequence[ClaimCommand]) -> list[list[Claim] | Exception]:
        """Take the first tasks of lanes, in the order of the commands."""
        wanted: dict[LaneId, int] = {}
        for command in commands:
            wanted[command.lane] = wanted.get(command.lane, 0) + len(command.placements)
        waiting: dict[LaneId, list[TaskRow]] = {}
        more: dict[LaneId, bool] = {}
        for lane_id, count in wanted.items():
            waiting[lane_id], more[lane_id] = self._first(transaction, lane_id, count)
        ids = [row.id for rows in waiting.values() for row in rows]
        if not ids:
            return [[] for _ in commands]
        specs = specs_of(transaction, ids)
        failed = failed_models(transaction, [row.id for rows in waiting.values() for row in rows if row.attempts])
        taken: list[tuple[int, TaskRow, Placement]] = []
        outcomes: list[list[Claim] | Exception] = []
        for command in commands:
            rows = waiting[command.lane]
            mine = list(zip(rows, command.placements, strict=False))
            waiting[command.lane] = rows[len(mine) :]
            claims = []
            for row, placement in mine:
                taken.append((row.epoch, row, placement))
                self._take(row, placement, transaction.now)
                transaction.events.append(event_of(row, transaction.now, EventType.SCHEDULED))
                lane = self.lanes.lane(transaction.connection, row.lane_id)
                further = more[command.lane] or bool(waiting[command.lane])
                claims.append(Claim(row.record, specs[row.id], lane, failed.get(row.id, ()), further))
            outcomes.append(claims)
        write_rows(transaction.connection, [(epoch, row) for epoch, row, _ in taken])
        bulk.insert(
            transaction.connection,
            schema.attempts,
            _ATTEMPT,
            [
                (
                    row.id, row.attempts, row.epoch, placement.server_id, placement.instance_id, placement.model,
                    placement.provider, transaction.now, None, False, "", "", 0,
                )
                for _, row, placement in taken
            ],
        )  # fmt: skip
        return outcomes

    def _first(self, transaction: Transaction, lane: LaneId, count: int) -> tuple[list[TaskRow], bool]:
        """The first tasks of a lane, locked, and whether there are more. Those that are too late expire here."""
        floor = self.floors.get(lane, transaction.now) if self.floors else ""
        rows = self._behind(transaction, lane, floor, count)
        if floor and len(rows) < count:
            floor = ""
            rows = self._behind(transaction, lane, floor, count)
        if len(rows) < count:
            return rows, False
        last = rows[-1].id
        if floors := self.floors:
            transaction.after_commit.append(lambda: floors.put(lane, floor, last, transaction.now))
        following = transaction.connection.execute(_FOLLOWING, {"lane": lane, "after": last}).first()
        return rows, following is not None

    def _behind(self, transaction: Transaction, lane: LaneId, after: str, count: int) -> list[TaskRow]:
        """The first tasks of a lane whose id is greater."""
        query = _FIRST[transaction.connection.dialect.name]
        rows: list[TaskRow] = []
        while len(rows) < count:
            wanted = count - len(rows)
            found = transaction.connection.execute(query, {"lane": lane, "after": after, "most": wanted})
            some = [row_of(row) for row in found]
            over = [row for row in some if row.deadline is not None and row.deadline <= transaction.now]
            if over:
                work = Work(transaction, {row.id: row for row in over}, self.max_lost)
                for row in over:
                    expire(row, work)
                work.write()
            rows += [row for row in some if row.state == TaskState.QUEUED]
            if len(some) < wanted:
                break
            after = some[-1].id
        return rows

    def _take(self, row: TaskRow, placement: Placement, now: float) -> None:
        row.state, row.updated_at = TaskState.SCHEDULED, now
        row.epoch += 1
        row.attempts += 1
        row.owner = self.owner
        row.server_id, row.model, row.provider = placement.server_id, placement.model, placement.provider


_ATTEMPT = tuple(column.name for column in schema.attempts.columns)

_in_lane = (
    all_columns()
    .where(*in_lane(bindparam("lane"), bindparam("after")))
    .order_by(*FIRST_IN_LANE)
    .limit(bindparam("most"))
)
_FOLLOWING = (
    select(schema.tasks.c.id)
    .where(*in_lane(bindparam("lane"), bindparam("after")))
    .order_by(*FIRST_IN_LANE)
    .limit(literal_column("1"))
)
_FIRST = {"sqlite": _in_lane, "postgresql": _in_lane.with_for_update(skip_locked=True)}


def specs_of(transaction: Transaction, ids: Sequence[TaskId]) -> dict[TaskId, bytes]:
    table = schema.payloads
    query = select(table.c.task_id, table.c.spec).where(bulk.among(transaction.connection, table.c.task_id, list(ids)))
    return {TaskId(row.task_id): row.spec for row in transaction.connection.execute(query)}


def failed_models(transaction: Transaction, ids: Sequence[TaskId]) -> dict[TaskId, FailedModels]:
    """Server, model and reason of every attempt that failed."""
    if not ids:
        return {}
    table = schema.attempts
    query = (
        select(table.c.task_id, table.c.server_id, table.c.model, table.c.failure_reason)
        .where(bulk.among(transaction.connection, table.c.task_id, list(ids)), table.c.failed)
        .order_by(table.c.task_id, table.c.number)
    )
    found: dict[TaskId, FailedModels] = {}
    for row in transaction.connection.execute(query):
        id = TaskId(row.task_id)
        found[id] = (*found.get(id, ()), (row.server_id, row.model, row.failure_reason))
    return found
