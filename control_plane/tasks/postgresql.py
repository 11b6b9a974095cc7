"""A PostgreSQL database, which several control planes may share.

One connection writes, a few read, one listens. A notification is a hint that makes things quick; what counts is a look
each second. Everything runs on the event loop; SQLAlchemy's sync code waits in greenlets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import Connection, Double, cast, func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool

from control_plane.tasks import schema, versions
from control_plane.tasks.database import Database, transact, tries
from control_plane.tasks.faults import brief, translated
from control_plane.tasks.lane_rows import startable
from control_plane.tasks.location import PostgresDatabase, StoreError
from control_plane.tasks.model import Changes, LaneId, TaskId
from control_plane.tasks.transaction import Job, Transaction
from control_plane.tasks.versions import Version

log = logging.getLogger(__name__)

T = TypeVar("T")

_CHANNEL = "modelyard_tasks"
_MOST_TOLD = 7900
"""Bytes of a notification; PostgreSQL takes less than 8,000."""
_POLL = 1.0
_CONNECT_TIMEOUT = 5.0
_COMMAND_TIMEOUT = 15.0
_READERS = 4

# A process that stands still in the middle of a transaction must not stop the others.
_SESSION = {
    "application_name": "modelyard",
    "idle_in_transaction_session_timeout": "4000",
    "statement_timeout": "12000",
    "lock_timeout": "6000",
}


class PostgresqlDatabase(Database):
    """See `Database`. Its clock is the server's, measured each second."""

    def __init__(self, place: PostgresDatabase, owner: str, writer: AsyncEngine, readers: AsyncEngine) -> None:
        super().__init__(owner)
        self._place = place
        self._writer = writer
        self._readers = readers
        self._offset = 0.0
        self._latest = 0.0
        self._seen = (0, 0)
        self._committing: asyncio.Task[None] | None = None
        self._background: list[asyncio.Task[None]] = []

    @property
    def shared(self) -> bool:
        return True

    def now(self) -> float:
        self._latest = max(self._latest, time.monotonic() + self._offset)
        return self._latest

    async def read(self, operation: Callable[[Connection], T]) -> T:
        if self._closing:
            raise translated(OSError("it is closed"))
        try:
            async with asyncio.timeout(_COMMAND_TIMEOUT), self._readers.connect() as connection:
                return await connection.run_sync(operation)
        except Exception as error:
            told = translated(error)
            if told is error:
                raise
            raise told from None

    # -------------------------------------------------------------- writing ---

    def _start(self, jobs: list[Job]) -> None:
        self._committing = asyncio.create_task(self._commit(jobs), name="tasks-writer")

    async def _commit(self, jobs: list[Job]) -> None:
        changes: list[Changes] = []
        try:
            plan = tries(jobs)
            todo = next(plan)
            while True:
                failure: Exception | None = None
                try:
                    change = await self._once(todo)
                    if change:
                        changes.append(change)
                except Exception as error:
                    failure = error
                try:
                    todo = plan.send(failure)
                except StopIteration:
                    break
        except BaseException as error:  # nobody may wait for ever
            for job in jobs:
                job.outcome = translated(error)
            raise
        finally:
            self._finished(jobs, changes)

    async def _once(self, jobs: Any) -> Changes | None:
        async with asyncio.timeout(2 * _COMMAND_TIMEOUT), self._writer.connect() as connection:
            return await connection.run_sync(lambda sync: transact(sync, jobs, self.now(), self._notify))

    def _notify(self, transaction: Transaction) -> None:
        """Tell other processes, when this is committed: one notification for each transaction."""
        changes = transaction.changes
        if not changes:
            return
        told = {
            "from": self.owner,
            "lanes": sorted(changes.lanes),
            "returned": sorted(changes.returned),
            "ended": sorted(changes.ended),
            "events": changes.events,
            "deliveries": changes.deliveries,
            "beliefs": changes.beliefs,
        }
        payload = json.dumps(told, separators=(",", ":"))
        if len(payload) > _MOST_TOLD:  # too much to say: let them look
            payload = json.dumps({"from": self.owner})
        transaction.connection.execute(_NOTIFY, {"channel": _CHANNEL, "payload": payload})

    # ------------------------------------------------------------ listening ---

    async def begin(self) -> None:
        """Measure the clock, then listen and look in the background."""
        await self._look(tell=False)
        self._background = [
            asyncio.create_task(self._listen(), name="tasks-listener"),
            asyncio.create_task(self._poll(), name="tasks-poll"),
        ]

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(_POLL)
            # While the database is away there is nothing to be seen; the next look finds what has changed.
            with contextlib.suppress(Exception):
                await self._look()

    async def _look(self, tell: bool = True) -> None:
        before = time.monotonic()
        at, events, beliefs, lanes = await self.read(_look)
        after = time.monotonic()
        self._offset = at - (before + after) / 2
        (seen_events, seen_beliefs), self._seen = self._seen, (events, beliefs)
        changes = Changes(
            lanes=frozenset(lanes),
            events=events != seen_events,
            deliveries=events != seen_events,
            beliefs=beliefs != seen_beliefs,
        )
        if tell and changes != Changes():
            self._tell(changes)

    async def _listen(self) -> None:
        warned = False
        while True:
            try:
                connection = await _connect(self._place.dsn)
                gone = asyncio.Event()
                connection.add_termination_listener(lambda *_, gone=gone: gone.set())
                try:
                    await connection.add_listener(_CHANNEL, self._heard)
                    warned = False
                    await gone.wait()
                finally:
                    connection.terminate()
            except Exception as error:
                if not warned:
                    log.warning("cannot listen for changes in %s: %s", self._place.shown, brief(error))
                    warned = True
            await asyncio.sleep(_POLL)

    def _heard(self, connection: object, pid: int, channel: str, payload: object) -> None:
        changes = _changes_of(str(payload), self.owner)
        if changes:
            self._tell(changes)

    async def _close(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for engine in (self._writer, self._readers):
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_CONNECT_TIMEOUT):
                    await engine.dispose()


_NOTIFY = text("SELECT pg_notify(:channel, :payload)")


def _look(connection: Connection) -> tuple[float, int, int, list[LaneId]]:
    """The database's clock, the numbers given so far, lanes with tasks that can start."""
    row = connection.execute(_CLOCK_AND_COUNTERS).one()
    return row.at, row.events, row.beliefs, startable(connection)


_CLOCK_AND_COUNTERS = select(
    cast(func.extract("epoch", func.clock_timestamp()), Double).label("at"),
    schema.counters.c.events,
    schema.counters.c.beliefs,
)


def _changes_of(payload: str, own: str) -> Changes | None:
    """What another process told; None for one's own words and for what cannot be read."""
    try:
        told = json.loads(payload)
        if told["from"] == own:
            return None
        if "lanes" not in told:
            return Changes(events=True, deliveries=True, beliefs=True)
        return Changes(
            lanes=frozenset(LaneId(int(id)) for id in told["lanes"]),
            returned=frozenset(LaneId(int(id)) for id in told.get("returned", ())),
            ended=frozenset((TaskId(str(id)), int(epoch)) for id, epoch in told["ended"]),
            events=bool(told["events"]),
            deliveries=bool(told["deliveries"]),
            beliefs=bool(told["beliefs"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


# ---------------------------------------------------------------- opening ---


async def _connect(dsn: str, **settings: str) -> asyncpg.Connection:
    return await asyncpg.connect(
        dsn, timeout=_CONNECT_TIMEOUT, command_timeout=_COMMAND_TIMEOUT, server_settings={**_SESSION, **settings}
    )


def engine(place: PostgresDatabase, size: int, **settings: str) -> AsyncEngine:
    """Connections to the database; `settings` are PostgreSQL's."""

    async def connect() -> asyncpg.Connection:
        return await _connect(place.dsn, **settings)

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=size,
        max_overflow=0,
        pool_timeout=_CONNECT_TIMEOUT,
        hide_parameters=True,
    )


async def open_postgresql(place: PostgresDatabase, owner: str) -> PostgresqlDatabase:
    """Open a database whose tables are up to date. Raises StoreError."""
    writer = engine(place, 1)
    readers = engine(place, _READERS).execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    database = PostgresqlDatabase(place, owner, writer, readers)
    try:
        async with writer.connect() as connection:
            versions.check(await connection.run_sync(versions.version), place.shown)
        await database.begin()
    except BaseException as error:
        await database.close()
        if isinstance(error, Exception) and not isinstance(error, StoreError):
            raise StoreError(f"tasks.store {place.shown}: {brief(error)}") from None
        raise
    return database


async def status(place: PostgresDatabase) -> Version:
    """Which tables the database has. Raises StoreError."""
    return await _administer(place, versions.version)


async def upgrade(place: PostgresDatabase) -> tuple[Version, Version]:
    """Make the tables or bring them up to date; the versions before and after. Raises StoreError.

    Who upgrades at the same time waits.
    """

    def work(connection: Connection) -> tuple[Version, Version]:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _UPGRADE_LOCK})
        connection.commit()
        before = versions.bring_up_to_date(connection, place.shown)
        return before, Version(before.newest)

    return await _administer(place, work)


_UPGRADE_LOCK = 0x6D6F64656C
"""Of this session, until it ends."""


async def _administer(place: PostgresDatabase, work: Callable[[Connection], T]) -> T:
    """Work on a connection of its own that may take as long as it takes. Raises StoreError."""

    async def connect() -> asyncpg.Connection:
        return await asyncpg.connect(
            place.dsn, timeout=_CONNECT_TIMEOUT, server_settings={"application_name": "modelyard db"}
        )

    alone = create_async_engine(
        "postgresql+asyncpg://", async_creator=connect, poolclass=NullPool, hide_parameters=True
    )
    try:
        async with alone.connect() as connection:
            return await connection.run_sync(work)
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"tasks.store {place.shown}: {brief(error)}") from None
    finally:
        await alone.dispose()
