"""Tasks in a database: `ports.TaskStore` over any `Database`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, func, select

from control_plane.domain.learned import Learned
from control_plane.tasks import bulk, lane_rows, reading, schema
from control_plane.tasks import transitions as happen
from control_plane.tasks.database import Database
from control_plane.tasks.intake import ClaimCommand, Ids, Intake
from control_plane.tasks.lane_rows import Floors, Lanes
from control_plane.tasks.lanes import from_json
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
from control_plane.tasks.rows import Work, rows_of
from control_plane.tasks.sweep import Sweeper, renew_lease
from control_plane.tasks.transaction import Batch, Transaction

_PURGE_INTERVAL = 60.0
_LANES_INTERVAL = 3600.0

# Seconds after which what a predictor knew of a server that is no more is forgotten, and most entries that are read.
_KNOWLEDGE_KEPT = 30 * 86400.0
_KNOWLEDGE_MOST = 2000
"""Between two looks for lanes that no task needs: a look reads every task."""


@dataclass(frozen=True, slots=True)
class StorePolicy:
    """Seconds, counts. See the settings `tasks.*`."""

    lease: float = 10.0
    max_lost: int = 10
    retention: float = 7 * 24 * 3600.0


class SqlTaskStore:
    """See `ports.TaskStore`."""

    def __init__(self, database: Database, policy: StorePolicy, last: TaskId | None) -> None:
        self.database = database
        self._policy = policy
        floors = Floors() if database.shared else None
        self._intake = Intake(database.owner, Lanes(), Ids(last), policy.max_lost, floors)
        if floors:
            database.listen(lambda changes: floors.drop(changes.returned))
        self._sweeper = Sweeper(self._intake, policy.retention)
        self._submit = Batch("submit", 10, self._intake.submit)
        self._change = Batch("change", 20, self._apply_changes)
        self._claim = Batch("claim", 30, self._apply_claims)
        self._held: dict[TaskId, int] = {}
        """Tasks in hand of this process, with their epochs; the writer's. For shared databases."""
        self._renewed = float("-inf")
        self._purged = float("-inf")
        self._looked = float("-inf")

    @classmethod
    async def open(cls, database: Database, policy: StorePolicy | None = None) -> SqlTaskStore:
        """The tasks of an open database. Where it is this process's alone, what was in hand is queued again first."""
        last = await database.read(lambda connection: connection.execute(select(func.max(schema.tasks.c.id))).scalar())
        store = cls(database, policy or StorePolicy(), last)
        if not database.shared:
            await store._repeat(store._sweeper.all_held)
        return store

    async def close(self) -> None:
        """Finish what waits and close the database. Idempotent."""
        await self.database.close()

    def now(self) -> float:
        return self.database.now()

    def listen(self, told: Callable[[Changes], None]) -> Callable[[], None]:
        return self.database.listen(told)

    # ------------------------------------------------------------ clients ---

    async def submit(self, task: NewTask) -> Submitted:
        return await self.database.apply(self._submit, task)

    async def get(self, tenant: Tenant, id: TaskId) -> FullTask:
        return await self.database.read(lambda connection: reading.full_task(connection, tenant, id))

    async def page(self, tenant: Tenant, filter: Filter, limit: int, before: TaskId | None = None) -> list[TaskRecord]:
        return await self.database.read(lambda connection: reading.page(connection, tenant, filter, limit, before))

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
        return await self.database.read(
            lambda connection: reading.events(connection, tenant, after, limit, task_id, filter, typed)
        )

    async def last_event_id(self) -> int:
        return await self.database.read(reading.last_event_id)

    async def cancel(self, tenant: Tenant, id: TaskId) -> TaskRecord:
        return await self._changed(happen.Cancel(id, tenant))

    async def retry(self, tenant: Tenant, id: TaskId) -> TaskRecord:
        return await self._changed(happen.RunAgain(id, tenant))

    async def delete(self, tenant: Tenant, id: TaskId) -> None:
        await self._changed(happen.Delete(id, tenant))

    async def counts(self, tenant: Tenant) -> dict[TaskState, int]:
        return await self.database.read(lambda connection: reading.counts(connection, tenant))

    async def waiting_count(self, lane: LaneId, most: int) -> int:
        return await self.database.read(lambda connection: reading.waiting_count(connection, lane, most))

    # -------------------------------------------------------- dispatchers ---

    async def waiting_lanes(self, among: Collection[LaneId] | None = None) -> list[WaitingLane]:
        found = await self.database.read(lambda connection: lane_rows.first_tasks(connection, among))
        return [WaitingLane(id, from_json(lane), oldest) for id, lane, oldest in found]

    async def claim(self, lane: LaneId, placements: Sequence[Placement]) -> list[Claim]:
        if not placements:
            return []
        claiming = asyncio.ensure_future(self.database.apply(self._claim, ClaimCommand(lane, tuple(placements))))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # Nobody will run them. Wait, so that nothing is in hand that nobody has.
            claims = await claiming
            await asyncio.gather(*(self.give_back(claim.id, claim.epoch, "") for claim in claims))
            raise

    async def started(self, id: TaskId, epoch: int) -> bool:
        return await self._written(happen.Start(id, epoch))

    async def succeeded(self, id: TaskId, epoch: int, result: bytes, cost_nano_usd: int) -> bool:
        return await self._written(happen.Succeed(id, epoch, result, cost_nano_usd))

    async def attempt_failed(self, id: TaskId, epoch: int, reason: str, message: str, retry: Retry | None) -> bool:
        ready_at, lane = (retry.ready_at, retry.lane) if retry else (None, None)
        return await self._written(happen.Fail(id, epoch, reason, message, ready_at, lane))

    async def expired(self, id: TaskId, epoch: int) -> bool:
        return await self._written(happen.Expire(id, epoch))

    async def give_back(self, id: TaskId, epoch: int, reason: str) -> bool:
        return await self._written(happen.GiveBack(id, epoch, reason))

    async def heartbeat(self) -> None:
        if self.database.shared:
            await self.database.write(self._beat)

    async def sweep(self) -> None:
        if self.database.shared:
            await self._repeat(self._sweeper.left_behind)
        await self._repeat(self._sweeper.over)
        await self._repeat(self._sweeper.due)
        if self.now() >= self._purged + _PURGE_INTERVAL:
            self._purged = self.now()
            await self._repeat(self._sweeper.old)
        if self.now() >= self._looked + _LANES_INTERVAL:
            self._looked = self.now()
            await self.forget_lanes()

    async def forget_lanes(self) -> None:
        """Delete lanes that no task needs. Part of `sweep`, once an hour."""
        unused = await self.database.read(lambda connection: self._sweeper.unused_lanes(connection, self.now()))
        if unused:
            await self.database.write(lambda transaction: lane_rows.forget(transaction, unused, self._intake.lanes))

    async def learned(self) -> list[Learned]:
        def read(connection: Connection) -> list[Learned]:
            return [
                Learned(**json.loads(row)) for row in connection.execute(select(schema.statistics.c.data)).scalars()
            ]

        return await self.database.read(read)

    async def keep_learned(self, learned: Sequence[Learned]) -> None:
        columns = ("server_id", "model", "provider", "fingerprint", "data", "updated_at")
        rows = {
            (one.server_id, one.model, one.provider): (one.fingerprint, json.dumps(asdict(one)), self.now())
            for one in learned
        }

        def write(transaction: Transaction) -> None:
            values = [(*key, *rest) for key, rest in sorted(rows.items())]
            bulk.upsert(transaction.connection, schema.statistics, columns, columns[:3], values)

        if rows:
            await self.database.write(write)

    async def knowledge(self) -> dict[str, str]:
        table, oldest = schema.knowledge, self.now() - _KNOWLEDGE_KEPT

        def read(connection: Connection) -> dict[str, str]:
            query = select(table.c.name, table.c.data).where(table.c.updated_at > oldest)
            newest = query.order_by(table.c.updated_at.desc()).limit(_KNOWLEDGE_MOST)
            return {row.name: row.data for row in connection.execute(newest)}

        return await self.database.read(read)

    async def keep_knowledge(self, entries: Mapping[str, str]) -> None:
        table, now = schema.knowledge, self.now()
        rows = [(name, data, now) for name, data in sorted(entries.items())]

        def write(transaction: Transaction) -> None:
            bulk.upsert(transaction.connection, table, ("name", "data", "updated_at"), ("name",), rows)
            transaction.connection.execute(table.delete().where(table.c.updated_at < now - _KNOWLEDGE_KEPT))

        if rows:
            await self.database.write(write)

    # -------------------------------------------------------------- parts ---

    async def _changed(self, change: happen.OfClient) -> TaskRecord:
        outcome: TaskRecord = await self.database.apply(self._change, change)
        return outcome

    async def _written(self, change: happen.OfAttempt) -> bool:
        outcome: bool = await self.database.apply(self._change, change)
        return outcome

    async def _repeat(self, step: Callable[[Transaction], bool]) -> None:
        while await self.database.write(step):
            pass

    def _apply_changes(self, transaction: Transaction, changes: Sequence[happen.Change]) -> Sequence[Any]:
        outcomes = self._intake.change(transaction, changes)
        if self.database.shared:
            gone = [
                change.id
                for change, outcome in zip(changes, outcomes, strict=True)
                if outcome is True and not isinstance(change, happen.Start)
            ]
            gone += [id for id, _ in transaction.changes.ended]
            transaction.after_commit.append(lambda: self._let_go(gone))
        return outcomes

    def _apply_claims(self, transaction: Transaction, commands: Sequence[ClaimCommand]) -> Sequence[Any]:
        outcomes = self._intake.claim(transaction, commands)
        if self.database.shared:
            held = {claim.id: claim.epoch for claims in outcomes if isinstance(claims, list) for claim in claims}
            if held and self.now() > self._renewed + self._policy.lease / 3:
                self._renew(transaction)
            transaction.after_commit.append(lambda: self._held.update(held))
        return outcomes

    def _let_go(self, ids: Sequence[TaskId]) -> None:
        for id in ids:
            self._held.pop(id, None)

    def _renew(self, transaction: Transaction) -> None:
        renew_lease(transaction, self.database.owner, self._policy.lease)
        at = self.now()

        def renewed() -> None:
            self._renewed = at

        transaction.after_commit.append(renewed)

    def _beat(self, transaction: Transaction) -> None:
        """Renew the lease; compare what is in hand by this process's and by the database's account."""
        self._renew(transaction)
        tasks = schema.tasks
        query = select(tasks.c.id, tasks.c.epoch).where(tasks.c.owner == self.database.owner)
        theirs = {TaskId(row.id): int(row.epoch) for row in transaction.connection.execute(query)}
        lost = {(id, epoch) for id, epoch in self._held.items() if theirs.get(id) != epoch}
        transaction.changes.ended |= lost
        # Claimed in a transaction whose end was never heard of: nobody runs them.
        orphans = [id for id in theirs if id not in self._held]
        if orphans:
            work = Work(transaction, rows_of(transaction.connection, orphans), self._policy.max_lost)
            for row in work.rows.values():
                if row.owner == self.database.owner:
                    happen.lose(row, work, "its claim was not answered")
            work.write()
        transaction.after_commit.append(lambda: self._let_go([id for id, _ in lost]))
