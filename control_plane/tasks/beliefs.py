"""Facts by key: what is held to be true, by whom, and how surely. Values are JSON texts here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Row, and_, collate, or_, select
from sqlalchemy.sql import ClauseElement

from control_plane.domain.errors import DomainError
from control_plane.tasks import bulk, schema
from control_plane.tasks.database import Database
from control_plane.tasks.facts import BeliefRecord
from control_plane.tasks.model import Changes, Tenant
from control_plane.tasks.transaction import Batch, Transaction

_TABLE = schema.beliefs
_COLUMNS = tuple(column.name for column in _TABLE.columns)
_MOST_KEYS = 200
"""In one look at what is there: databases bound the parameters of a statement."""


@dataclass(frozen=True, slots=True)
class _Write:
    """What a client wants written."""

    tenant: Tenant
    key: str
    value: str = ""
    confidence: float = 1.0
    source: str = ""
    deleted: bool = False


class Beliefs:
    """Facts in the database. What a method has returned is on disk.

    Every method raises DomainError STORE_UNAVAILABLE when the database does not answer, and a writing one STORE_FULL
    when its disk is full.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def listen(self, told: Callable[[], None]) -> Callable[[], None]:
        """Be told when facts have changed, on the event loop. Call what is returned to stop."""

        def changed(changes: Changes) -> None:
            if changes.beliefs:
                told()

        return self._database.listen(changed)

    async def put(self, tenant: Tenant, key: str, value: str, confidence: float, source: str) -> BeliefRecord:
        """Write a fact over whatever was there."""
        return await self._database.apply(_WRITES, _Write(tenant, key, value, confidence, source))

    async def get(self, tenant: Tenant, key: str) -> BeliefRecord:
        """Raises UNKNOWN_BELIEF."""
        statement = select(_TABLE).where(_TABLE.c.tenant == tenant, _TABLE.c.key == key, ~_TABLE.c.deleted)
        row = await self._database.read(lambda connection: connection.execute(statement).one_or_none())
        if row is None:
            raise _unknown(key)
        return _record(row)

    async def delete(self, tenant: Tenant, key: str) -> None:
        """Forget a fact; a record of that stays for those who watch. Raises UNKNOWN_BELIEF."""
        await self._database.apply(_WRITES, _Write(tenant, key, deleted=True))

    async def page(self, tenant: Tenant, prefix: str, limit: int, after: str = "") -> list[BeliefRecord]:
        """Facts whose keys begin with a prefix, by key (in the order of their characters' numbers), after a key."""

        def read(connection: Connection) -> list[BeliefRecord]:
            key = _by_character(connection)
            statement = select(_TABLE).where(_TABLE.c.tenant == tenant, ~_TABLE.c.deleted, *_begins(key, prefix))
            if after:
                statement = statement.where(key > after)
            return [_record(row) for row in connection.execute(statement.order_by(key).limit(limit))]

        return await self._database.read(read)

    async def since(self, tenant: Tenant, prefix: str, after: int, limit: int) -> tuple[list[BeliefRecord], int]:
        """The latest of facts and deletions with versions greater than `after`, by version, and the version up to
        which was looked (>= after): facts that do not match count as seen."""

        def read(connection: Connection) -> tuple[list[BeliefRecord], int]:
            key = _by_character(connection)
            statement = (
                select(_TABLE)
                .where(_TABLE.c.version > after, _TABLE.c.tenant == tenant, *_begins(key, prefix))
                .order_by(_TABLE.c.version)
                .limit(limit)
            )
            # Before the facts, for databases in which two statements may see two moments.
            last = _last(connection)
            found = [_record(row) for row in connection.execute(statement)]
            if len(found) == limit:
                return found, found[-1].version
            return found, max([after, last, *(record.version for record in found[-1:])])

        return await self._database.read(read)

    async def last_version(self) -> int:
        """Of all facts that are visible."""
        return await self._database.read(_last)


def _unknown(key: str) -> DomainError:
    return DomainError("UNKNOWN_BELIEF", f"there is no belief {key!r}")


def _record(row: Row[tuple[object, ...]]) -> BeliefRecord:
    return BeliefRecord(
        row.key, row.value, row.confidence, row.source, row.updated_at, row.version, deleted=bool(row.deleted)
    )


def _last(connection: Connection) -> int:
    return int(connection.execute(select(schema.counters.c.beliefs)).scalar_one())


def _by_character(connection: Connection) -> ColumnElement[str]:
    """The key, ordered by the numbers of its characters, in whatever language the database was made."""
    return _TABLE.c.key if connection.dialect.name == "sqlite" else collate(_TABLE.c.key, "C")


def _begins(key: ColumnElement[str], prefix: str) -> list[ColumnElement[bool]]:
    return [key >= prefix, key < f"{prefix}\U0010ffff"] if prefix else []


# ---------------------------------------------------------------- writing ---


def _write(transaction: Transaction, writes: Sequence[_Write]) -> Sequence[BeliefRecord | Exception]:
    """In the order in which they came; of several for one key each is answered, the last one stays."""
    connection = transaction.connection
    # First of all: whoever holds the numbers is the only one who writes facts.
    _, version = transaction.numbers(beliefs=len(writes))
    there = _there(connection, {(write.tenant, write.key) for write in writes if write.deleted})
    outcomes: list[BeliefRecord | Exception] = []
    rows: dict[tuple[str, str], tuple[object, ...]] = {}
    for number, write in enumerate(writes, version):
        place = (write.tenant, write.key)
        if write.deleted and place not in there:
            outcomes.append(_unknown(write.key))
            continue
        (there.discard if write.deleted else there.add)(place)
        record = BeliefRecord(
            write.key, write.value, write.confidence, write.source, transaction.now, number, write.deleted
        )
        outcomes.append(record)
        rows[place] = (
            *place, record.value, record.confidence, record.source, record.updated_at, record.version, record.deleted
        )  # fmt: skip
    if rows:
        bulk.upsert(connection, _TABLE, _COLUMNS, ("tenant", "key"), list(rows.values()))
        transaction.changes.beliefs = True
    return outcomes


def _there(connection: Connection, places: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Which of these facts exist."""
    found: set[tuple[str, str]] = set()
    wanted = sorted(places)
    for start in range(0, len(wanted), _MOST_KEYS):
        some: list[ClauseElement] = [
            and_(_TABLE.c.tenant == tenant, _TABLE.c.key == key) for tenant, key in wanted[start : start + _MOST_KEYS]
        ]
        statement = select(_TABLE.c.tenant, _TABLE.c.key).where(~_TABLE.c.deleted, or_(*some))  # type: ignore[arg-type]
        found.update((row.tenant, row.key) for row in connection.execute(statement))
    return found


# After everything that locks rows, for it takes numbers: see `Transaction.numbers`.
_WRITES: Batch[_Write, BeliefRecord] = Batch("belief", 95, _write)
