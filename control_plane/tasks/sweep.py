"""What time does to tasks: what is due can start, what is over expires, what was left behind is queued again, what was
kept long enough is purged. In steps that are short enough for other writers to come in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Double, Select, cast, delete, func, literal, select

from control_plane.tasks import lane_rows, schema
from control_plane.tasks.intake import Intake
from control_plane.tasks.model import TaskId
from control_plane.tasks.rows import TaskRow, Work, all_columns, delete_tasks, row_of
from control_plane.tasks.transaction import Transaction
from control_plane.tasks.transitions import SOURCE, belief_key, expire, lose, ripen

STEP = 500
"""Tasks of one transaction."""


@dataclass
class Sweeper:
    """Steps of a sweep. Each is an operation of the writer and answers whether there may be more to do."""

    intake: Intake
    retention: float
    """Seconds that a terminal task is kept."""

    def due(self, transaction: Transaction) -> bool:
        """Tasks whose time has come can start."""
        tasks = schema.tasks
        query = all_columns().where(schema.IS_LATER, tasks.c.ready_at <= transaction.now).order_by(tasks.c.ready_at)
        return self._each(transaction, query, ripen)

    def over(self, transaction: Transaction) -> bool:
        """Tasks whose deadline has passed expire, but for those in hand: their dispatchers stop them."""
        tasks = schema.tasks
        query = all_columns().where(
            tasks.c.deadline.is_not(None),
            schema.NOT_TERMINAL,
            tasks.c.deadline <= transaction.now,
            tasks.c.owner.is_(None),
        )
        return self._each(transaction, query.order_by(tasks.c.deadline), expire)

    def left_behind(self, transaction: Transaction) -> bool:
        """Tasks whose owner's lease has run out, or is unknown, are queued again."""
        tasks, dispatchers = schema.tasks, schema.dispatchers
        alive = select(dispatchers.c.id).where(dispatchers.c.lease_until >= database_time(transaction))
        query = all_columns().where(tasks.c.owner.is_not(None), tasks.c.owner.not_in(alive))
        more = self._each(
            transaction, query, lambda row, work: lose(row, work, "the control plane that ran it is gone")
        )
        if not more:
            held = select(tasks.c.id).where(tasks.c.owner == dispatchers.c.id).exists()
            transaction.connection.execute(
                delete(dispatchers).where(dispatchers.c.lease_until < database_time(transaction), ~held)
            )
        return more

    def all_held(self, transaction: Transaction) -> bool:
        """Every task in hand is queued again: the one process that an embedded database had is gone."""
        query = all_columns().where(schema.tasks.c.owner.is_not(None))
        return self._each(transaction, query, lambda row, work: lose(row, work, "the control plane was started anew"))

    def old(self, transaction: Transaction) -> bool:
        """Terminal tasks are purged, and what is left of deleted facts."""
        tasks, beliefs = schema.tasks, schema.beliefs
        before = transaction.now - self.retention
        query = select(tasks.c.id, tasks.c.tenant).where(tasks.c.finished_at.is_not(None), tasks.c.finished_at < before)
        found = transaction.connection.execute(self._some(transaction, query.order_by(tasks.c.finished_at))).all()
        if found:
            delete_tasks(transaction.connection, [TaskId(row.id) for row in found])
            for row in found:
                transaction.believe(row.tenant, belief_key(TaskId(row.id)), "null", source=SOURCE, deleted=True)
        transaction.connection.execute(delete(beliefs).where(beliefs.c.deleted, beliefs.c.updated_at < before))
        return len(found) == STEP

    def unused_lanes(self, connection: Connection, now: float) -> list[int]:
        """Lanes that may be forgotten."""
        return lane_rows.unused(connection, now, STEP)

    # ---------------------------------------------------------------- parts ---

    def _each(
        self, transaction: Transaction, query: Select[tuple[TaskRow]], happen: Callable[[TaskRow, Work], None]
    ) -> bool:
        found = [row_of(row) for row in transaction.connection.execute(self._some(transaction, query))]
        work = Work(transaction, {row.id: row for row in found}, self.intake.max_lost)
        for row in found:
            happen(row, work)
        work.write()
        return len(found) == STEP

    @staticmethod
    def _some(transaction: Transaction, query: Select) -> Select:  # type: ignore[type-arg]
        query = query.limit(STEP)
        if transaction.connection.dialect.name == "sqlite":
            return query
        return query.with_for_update(skip_locked=True, of=schema.tasks)  # others may sweep at the same time


def database_time(transaction: Transaction) -> ColumnElement[float]:
    """Seconds since the epoch by the database's own clock, where it has one."""
    if transaction.connection.dialect.name == "sqlite":
        return literal(transaction.now, Double)
    return cast(func.extract("epoch", func.clock_timestamp()), Double)


def renew_lease(transaction: Transaction, owner: str, lease: float) -> None:
    """`owner` is alive for `lease` more seconds by the database's clock."""
    from sqlalchemy.dialects.postgresql import insert  # 2 MB, for those who use it

    statement = insert(schema.dispatchers).values(id=owner, lease_until=database_time(transaction) + lease)
    transaction.connection.execute(
        statement.on_conflict_do_update(index_elements=["id"], set_={"lease_until": statement.excluded.lease_until})
    )
