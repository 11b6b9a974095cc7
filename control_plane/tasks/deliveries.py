"""Callbacks in the database: written when a task ends (by the task store), taken, repeated, listed, sent again."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, delete, func, literal_column, select, tuple_, update

from control_plane.domain.errors import DomainError
from control_plane.tasks import schema
from control_plane.tasks.bulk import among
from control_plane.tasks.callbacks import CallbackState, DeliveryRecord, NotAllowed, Rules, origin_of
from control_plane.tasks.database import Database
from control_plane.tasks.model import Changes, TaskId, TaskState, Tenant
from control_plane.tasks.transaction import Transaction

_TABLE = schema.deliveries
_PENDING = _TABLE.c.state == literal_column("1")  # written out for the sake of a partial index
_LOOK = 500
_LOOKS = 20
"""Looks of so many rows at what is due: behind more of one host that is busy, others wait."""


class Deliveries:
    """What there is to deliver. Every method raises DomainError STORE_UNAVAILABLE, a writing one STORE_FULL."""

    def __init__(self, database: Database, rules: Rules) -> None:
        self._database = database
        self._rules = rules

    # ---------------------------------------------------------- for the API ---

    def problem(self, url: str) -> str | None:
        """What keeps an address from being called."""
        try:
            self._rules.check(url)
        except NotAllowed as refused:
            return str(refused)
        return None

    async def counts(self, tenant: Tenant) -> tuple[int, int]:
        """Callbacks of a tenant that wait for delivery, and those that were given up."""
        states = (CallbackState.PENDING, CallbackState.DEAD)
        statement = (
            select(_TABLE.c.state, func.count())
            .where(_TABLE.c.tenant == tenant, _TABLE.c.state.in_(states))
            .group_by(_TABLE.c.state)
        )
        rows = await self._database.read(lambda connection: connection.execute(statement).all())
        counted = {row[0]: int(row[1]) for row in rows}
        return counted.get(CallbackState.PENDING, 0), counted.get(CallbackState.DEAD, 0)

    async def page(
        self, tenant: Tenant, states: Sequence[CallbackState], task_id: str, limit: int, before: str = ""
    ) -> list[DeliveryRecord]:
        """Callbacks of a tenant, those of the newest tasks first, with ids less than `before`. No states: all."""

        def of(*conditions: ColumnElement[bool]) -> Select[Any]:
            statement = select(_TABLE).where(_TABLE.c.tenant == tenant, *conditions)
            if before:
                statement = statement.where(_TABLE.c.id < before)
            return statement.order_by(_TABLE.c.id.desc()).limit(limit)

        if task_id:
            wanted = [_TABLE.c.state.in_(states)] if states else []
            statements = [of(_TABLE.c.task_id == task_id, *wanted)]
        else:
            # One state at a time: that is how the index is made.
            statements = [of(_TABLE.c.state == state) for state in set(states or CallbackState)]

        def read(connection: Connection) -> list[DeliveryRecord]:
            found = [map(_record, connection.execute(statement).all()) for statement in statements]
            return list(islice(heapq.merge(*found, key=lambda record: record.id, reverse=True), limit))

        return await self._database.read(read)

    async def resend(self, tenant: Tenant, id: str) -> DeliveryRecord:
        """Make it due now, with its full number of attempts. Raises UNKNOWN_TASK."""
        statement = update(_TABLE).where(_TABLE.c.id == id, _TABLE.c.tenant == tenant).returning(*_TABLE.columns)

        def work(transaction: Transaction) -> DeliveryRecord:
            again = {"due_at": transaction.now, "attempts": 0, "finished_at": None, "failure": ""}
            row = transaction.connection.execute(
                statement.values(state=int(CallbackState.PENDING), **again)
            ).one_or_none()
            if row is None:
                raise DomainError("UNKNOWN_TASK", f"there is no callback {id!r}")
            transaction.changes.deliveries = True
            return _record(row)

        return await self._database.write(work)

    # ---------------------------------------------------- for the deliverer ---

    def now(self) -> float:
        """Seconds since the epoch by the database's clock."""
        return self._database.now()

    def listen(self, told: Callable[[], None]) -> Callable[[], None]:
        """Be told when there is more to deliver, on the event loop. Call what is returned to stop."""

        def changed(changes: Changes) -> None:
            if changes.deliveries:
                told()

        return self._database.listen(changed)

    async def next_due(self) -> float | None:
        """When the first callback is due; None: there is none."""
        statement = select(func.min(_TABLE.c.due_at)).where(_PENDING)
        due: float | None = await self._database.read(lambda connection: connection.execute(statement).scalar())
        return due

    async def claim(
        self, limit: int, per_origin: int, running: Mapping[str, int], lease: float
    ) -> list[DeliveryRecord]:
        """Take callbacks that are due, the longest due first, so that at most `per_origin` run against one host and
        port together with those of `running`. Each counts as an attempt, and nobody else takes it for `lease`
        seconds."""

        def work(transaction: Transaction) -> list[DeliveryRecord]:
            connection, now = transaction.connection, transaction.now
            due = (_PENDING, _TABLE.c.due_at <= now)
            chosen = _choose(connection, due, limit, per_origin, running)
            if not chosen:
                return []
            free = select(_TABLE.c.id).where(among(connection, _TABLE.c.id, chosen), *due)
            taken = connection.execute(
                update(_TABLE)
                .where(_TABLE.c.id.in_(free.with_for_update(skip_locked=True)))
                .values(due_at=now + lease, attempts=_TABLE.c.attempts + 1)
                .returning(*_TABLE.columns)
            ).all()
            return sorted(map(_record, taken), key=lambda record: chosen.index(record.id))

        return await self._database.write(work)

    async def ended(self, id: str, attempt: int, state: CallbackState, failure: str) -> bool:
        """It is delivered or dead. False: attempt number `attempt` is no longer the latest, nothing was written."""
        return await self._after(id, attempt, lambda now: {"state": int(state), "finished_at": now, "failure": failure})

    async def again(self, id: str, attempt: int, due_at: float, failure: str) -> bool:
        """It is due again at a time. False as above."""
        return await self._after(id, attempt, lambda _: {"due_at": due_at, "failure": failure})

    async def _after(self, id: str, attempt: int, values: Callable[[float], dict[str, Any]]) -> bool:
        statement = update(_TABLE).where(_TABLE.c.id == id, _TABLE.c.attempts == attempt, _PENDING)
        return await self._database.write(
            lambda transaction: (
                transaction.connection.execute(statement.values(**values(transaction.now))).rowcount == 1
            )
        )

    async def drop(self, id: str) -> None:
        """Forget it: its task was queued again, or deleted."""
        statement = delete(_TABLE).where(_TABLE.c.id == id)
        await self._database.write(lambda transaction: transaction.connection.execute(statement) and None)


def _choose(
    connection: Connection,
    due: Sequence[ColumnElement[bool]],
    limit: int,
    per_origin: int,
    running: Mapping[str, int],
) -> list[str]:
    """Ids of what is due and may run now."""
    at_work = Counter(running)
    chosen: list[str] = []
    after: tuple[float, str] | None = None
    for _ in range(_LOOKS):
        statement = select(_TABLE.c.id, _TABLE.c.url, _TABLE.c.due_at).where(*due)
        if after:
            statement = statement.where(tuple_(_TABLE.c.due_at, _TABLE.c.id) > tuple_(*after))
        rows = connection.execute(statement.order_by(_TABLE.c.due_at, _TABLE.c.id).limit(_LOOK)).all()
        for row in rows:
            origin = origin_of(row.url)
            if at_work[origin] < per_origin:
                at_work[origin] += 1
                chosen.append(row.id)
                if len(chosen) == limit:
                    return chosen
        if len(rows) < _LOOK:
            break
        after = rows[-1].due_at, rows[-1].id
    return chosen


def _record(row: Row[Any]) -> DeliveryRecord:
    return DeliveryRecord(
        id=row.id,
        task_id=TaskId(row.task_id),
        tenant=Tenant(row.tenant),
        epoch=row.epoch,
        task_state=TaskState(row.task_state),
        url=row.url,
        state=CallbackState(row.state),
        attempts=row.attempts,
        created_at=row.created_at,
        due_at=row.due_at,
        finished_at=row.finished_at,
        failure=row.failure,
    )
