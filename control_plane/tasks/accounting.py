"""Usage and budgets in the database.

An exchange is one transaction: it writes down what a control plane has used and settles its shares of budgets. It has a
number, and applying it twice is as good as once, so that one whose end was not heard of is simply sent again.

    what is spent of a budget + the shares of all control planes <= its limit

holds after every transaction, for the row of what is spent is locked first. A control plane that is not heard of until
its lease runs out, by the database's clock, loses its shares: what it had in hand when it was last heard of counts as
spent, the rest is free. Should it come back, that is corrected by what it has used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, delete, func, select

from control_plane.scheduling.budgets import Answer, Budget, PotKey, Unit, Window, Wish
from control_plane.scheduling.usage import Tally, UsageKey
from control_plane.tasks import bulk, schema
from control_plane.tasks.database import Database
from control_plane.tasks.sweep import database_time
from control_plane.tasks.transaction import Batch, Transaction

_DAY = 86400
_POT = ("tenant", "unit", "period", "starts")
_SPENDING = (*_POT, "spent")
_SHARES = (*_POT, "owner", "share", "in_hand", "charged")
_ACCOUNTANTS = ("id", "number", "lease_until")
_SUMS = ("requests", "failed", "estimated", "prompt_tokens", "cached_prompt_tokens", "completion_tokens", "nano_usd")
_USAGE_KEYS = ("hour", "tenant", "model", "provider", "server_id", "task_type")


class Dimension(Enum):
    """By what usage is told apart."""

    MODEL = "model"
    PROVIDER = "provider"
    SERVER = "server_id"
    TASK_TYPE = "task_type"
    HOUR = "hour"
    DAY = "day"

    @property
    def column(self) -> ColumnElement[Any]:
        usage = schema.usage.c
        return usage.hour - usage.hour % _DAY if self is Dimension.DAY else usage[self.value]


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one control plane has to say, and wants."""

    number: int
    """One more than that of the one before."""
    usage: Mapping[UsageKey, Tally] = field(default_factory=dict)
    wishes: Sequence[Wish] = ()


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What some attempts have used."""

    group: tuple[Any, ...]
    """Values of the dimensions that were asked for."""
    sums: Tally


@dataclass(frozen=True, slots=True)
class BudgetState:
    """How a budget stands in its present window."""

    budget: Budget
    starts: int
    ends: float
    spent: int
    held: int
    """By control planes."""
    held_by_lost: int
    """By those whose lease has run out."""


class Accounting:
    """Usage and budgets. Methods raise DomainError STORE_UNAVAILABLE, writing ones STORE_FULL too."""

    def __init__(self, database: Database, lease: float) -> None:
        """`lease`: seconds that shares are kept for a control plane that is not heard of."""
        self.database = database
        self.lease = lease
        # After everything that locks tasks, before what takes numbers: see `Transaction.numbers`.
        self._exchange = Batch("accounting", 92, self._apply)

    @property
    def shared(self) -> bool:
        """Other control planes use it, too."""
        return self.database.shared

    def now(self) -> float:
        """Seconds since 1970."""
        return self.database.now()

    # ------------------------------------------------------------ exchange ---

    async def exchange(self, exchange: Exchange) -> dict[PotKey, Answer]:
        """Write down and settle; one answer for each wish."""
        return await self.database.apply(self._exchange, exchange)

    async def leave(self) -> None:
        """This control plane ends; its shares have been given back."""
        owner = self.database.owner

        def write(transaction: Transaction) -> None:
            connection, shares = transaction.connection, schema.budget_shares
            if not connection.execute(select(shares.c.owner).where(shares.c.owner == owner).limit(1)).all():
                connection.execute(delete(schema.accountants).where(schema.accountants.c.id == owner))

        await self.database.write(write)

    async def settle_lost(self) -> None:
        """End the shares of control planes that are gone: those whose lease has run out, and in an embedded database
        all but this one."""
        await self.database.write(self._settle_lost)

    async def purge(self, retention: float) -> None:
        """Forget usage and budgets of windows that began so many seconds ago, and who has long been gone."""

        def write(transaction: Transaction) -> None:
            connection, before = transaction.connection, transaction.now - retention
            usage, accountants = schema.usage, schema.accountants
            connection.execute(delete(usage).where(usage.c.hour < before))
            for table in (schema.budget_spending, schema.budget_shares):
                connection.execute(delete(table).where(table.c.starts > 0, table.c.starts < before))
            connection.execute(delete(accountants).where(accountants.c.lease_until < before))

        await self.database.write(write)

    def _apply(self, transaction: Transaction, exchanges: Sequence[Exchange]) -> Sequence[dict[PotKey, Answer]]:
        return [self._one(transaction, exchange) for exchange in exchanges]

    def _one(self, transaction: Transaction, exchange: Exchange) -> dict[PotKey, Answer]:
        connection, owner = transaction.connection, self.database.owner
        mine = select(schema.accountants.c.number).where(schema.accountants.c.id == owner)
        if connection.dialect.name != "sqlite":
            mine = mine.with_for_update()
        number = connection.execute(mine).scalar()
        now = connection.execute(select(database_time(transaction))).scalar_one()
        row = (owner, exchange.number if number is None else max(number, exchange.number), now + self.lease)
        bulk.upsert(connection, schema.accountants, _ACCOUNTANTS, ("id",), [row])
        if number is not None and number >= exchange.number:
            return self._known(connection, exchange.wishes)
        if exchange.usage:
            rows = sorted((*key, *tally.values()) for key, tally in exchange.usage.items())
            bulk.add(connection, schema.usage, (*_USAGE_KEYS, *_SUMS), _USAGE_KEYS, rows)
        return self._divide(connection, exchange.wishes) if exchange.wishes else {}

    def _known(self, connection: Connection, wishes: Sequence[Wish]) -> dict[PotKey, Answer]:
        """The answers that were given before."""
        keys = [wish.key for wish in wishes]
        spent = {key: int(row.spent) for key, row in _rows(connection, schema.budget_spending, keys)}
        own = {
            key: int(row.share)
            for key, row in _rows(connection, schema.budget_shares, keys)
            if row.owner == self.database.owner
        }
        return {key: Answer(spent.get(key, 0), own.get(key, 0)) for key in keys}

    def _divide(self, connection: Connection, wishes: Sequence[Wish]) -> dict[PotKey, Answer]:
        owner, keys = self.database.owner, sorted(wish.key for wish in wishes)
        used = {wish.key: wish.used for wish in wishes}
        # Locks the rows, in their order.
        bulk.add(connection, schema.budget_spending, _SPENDING, _POT, [(*key, used[key]) for key in keys])
        spent = {key: int(row.spent) for key, row in _rows(connection, schema.budget_spending, keys)}
        others = dict.fromkeys(keys, 0)
        own: dict[PotKey, Any] = {}
        for key, row in _rows(connection, schema.budget_shares, keys):
            if row.owner == owner:
                own[key] = row
            else:
                others[key] += int(row.share)
        answers: dict[PotKey, Answer] = {}
        corrections, shares = [], []
        for wish in wishes:
            key, row = wish.key, own.get(wish.key)
            charged = int(row.charged) if row is not None else 0
            if charged:
                spent[key] -= charged
                corrections.append((*key, -charged))
            present = max(0, int(row.share) - wish.used) if row is not None else 0
            room = max(0, wish.limit - spent[key] - others[key] - present)
            share = min(wish.share, present + room)
            if share < wish.least:
                share = min(wish.in_hand, present)
            answers[key] = Answer(spent[key], share)
            shares.append((*key, owner, share, min(wish.in_hand, share), 0))
        if corrections:
            bulk.add(connection, schema.budget_spending, _SPENDING, _POT, sorted(corrections))
        bulk.upsert(connection, schema.budget_shares, _SHARES, (*_POT, "owner"), sorted(shares))
        _forget_empty(connection, owner)
        return answers

    def _settle_lost(self, transaction: Transaction) -> None:
        connection, accountants, shares = transaction.connection, schema.accountants, schema.budget_shares
        gone = accountants.c.id != self.database.owner
        if self.shared:
            gone = gone & (accountants.c.lease_until < database_time(transaction))
        held = select(shares.c.owner).where(shares.c.owner == accountants.c.id, shares.c.share > 0).exists()
        query = select(accountants.c.id).where(gone, held)
        if connection.dialect.name != "sqlite":
            query = query.with_for_update(skip_locked=True)  # others may do the same, or it may come back
        owners = list(connection.execute(query).scalars())
        if not owners:
            return
        charges: dict[PotKey, int] = {}
        found = []
        for row in connection.execute(select(shares).where(bulk.among(connection, shares.c.owner, owners))):
            key = PotKey(row.tenant, row.unit, row.period, int(row.starts))
            charges[key] = charges.get(key, 0) + int(row.in_hand)
            found.append((*key, row.owner, 0, 0, int(row.charged) + int(row.in_hand)))
        bulk.add(connection, schema.budget_spending, _SPENDING, _POT, sorted((*k, v) for k, v in charges.items()))
        bulk.upsert(connection, shares, _SHARES, (*_POT, "owner"), sorted(found))
        connection.execute(delete(shares).where(shares.c.share == 0, shares.c.charged == 0))

    # -------------------------------------------------------------- reading ---

    async def usage(
        self, tenant: str, since: float, until: float, by: Sequence[Dimension], limit: int
    ) -> tuple[list[UsageRow], Tally]:
        """What a tenant has used in the hours from `since` to `until`: a row for each combination of the dimensions,
        the dearest first, at most `limit`, and the sum of all."""
        table = schema.usage
        where = [table.c.tenant == tenant]
        if since > -math.inf:
            where.append(table.c.hour >= math.floor(since / 3600) * 3600)
        if until < math.inf:
            where.append(table.c.hour < math.ceil(until / 3600) * 3600)
        sums = [func.coalesce(func.sum(table.c[name]), 0).label(name) for name in _SUMS]
        columns = [dimension.column.label(f"by{i}") for i, dimension in enumerate(by)]

        def read(connection: Connection) -> tuple[list[UsageRow], Tally]:
            total = _tally(connection.execute(select(*sums).where(*where)).one())
            if not columns:
                return [], total
            tokens = func.sum(table.c.prompt_tokens + table.c.completion_tokens)
            query = (
                select(*columns, *sums)
                .where(*where)
                .group_by(*columns)
                .order_by(func.sum(table.c.nano_usd).desc(), tokens.desc(), *columns)
                .limit(limit)
            )
            rows = connection.execute(query).all()
            return [UsageRow(tuple(row[: len(columns)]), _tally(row[len(columns) :])) for row in rows], total

        return await self.database.read(read)

    async def budgets(self, tenant: str, budgets: Iterable[Budget]) -> list[BudgetState]:
        """How a tenant's budgets stand, in their order."""
        windows = {budget: budget.window.around(self.now()) for budget in budgets}
        keys = {budget: _key(tenant, budget.unit, budget.window, starts) for budget, (starts, _) in windows.items()}
        shares, accountants = schema.budget_shares, schema.accountants
        at = self.now()

        def read(connection: Connection) -> list[BudgetState]:
            spent = {key: int(row.spent) for key, row in _rows(connection, schema.budget_spending, list(keys.values()))}
            alive = {
                row.id: row.lease_until >= at
                for row in connection.execute(select(accountants.c.id, accountants.c.lease_until))
            }
            held = dict.fromkeys(keys.values(), 0)
            lost = dict.fromkeys(keys.values(), 0)
            for key, row in _rows(connection, shares, list(keys.values())):
                held[key] += int(row.share)
                if self.shared and not alive.get(row.owner, False):
                    lost[key] += int(row.share)
            return [
                BudgetState(budget, *windows[budget], spent.get(key, 0), held[key], lost[key])
                for budget, key in keys.items()
            ]

        return await self.database.read(read)


def _key(tenant: str, unit: Unit, window: Window, starts: int) -> PotKey:
    return PotKey(tenant, unit.value, window.value, starts)


def _rows(connection: Connection, table: Table, keys: Sequence[PotKey]) -> list[tuple[PotKey, Any]]:
    """The rows of some pots."""
    wanted = set(keys)
    query = select(table).where(
        bulk.among(connection, table.c.tenant, sorted({key.tenant for key in keys})),
        table.c.starts.in_({key.starts for key in keys}),
    )
    found = [(PotKey(row.tenant, row.unit, row.period, int(row.starts)), row) for row in connection.execute(query)]
    return [(key, row) for key, row in found if key in wanted]


def _forget_empty(connection: Connection, owner: str) -> None:
    shares = schema.budget_shares
    connection.execute(
        delete(shares).where(shares.c.owner == owner, shares.c.share == 0, shares.c.in_hand == 0, shares.c.charged == 0)
    )


def _tally(values: Iterable[Any]) -> Tally:
    return Tally(*(int(value) for value in values))
