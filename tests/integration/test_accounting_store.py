"""Usage and shares of budgets in the database: applied once, divided, taken from those who are gone."""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path

import pytest
from sqlalchemy import select, update

from control_plane.domain.funds import Amounts, Reckoning
from control_plane.fleet.accounts import Accounts
from control_plane.scheduling.budgets import Answer, Budget, Ledger, PotKey, Reservation, Unit, Window, Wish
from control_plane.scheduling.usage import Tally, UsageKey
from control_plane.tasks import schema
from control_plane.tasks.accounting import Accounting, BudgetState, Dimension, Exchange
from control_plane.tasks.bookkeeper import Bookkeeper
from control_plane.tasks.transaction import Transaction
from tests.harness.postgres import Postgres
from tests.harness.task_store import opened

BUDGET = Budget(Unit.NANO_USD, Window.TOTAL, 1000)
KEY = PotKey("a", "nano_usd", "total", 0)
ROW = UsageKey(7200, "a", "m", "p", "s", 1)


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/tasks.db"
    server: Postgres = request.getfixturevalue("postgres_server")
    return await server.tables()


@pytest.fixture
async def shared_url(postgres_server: Postgres) -> str:
    return await postgres_server.tables()


def wish(used: int = 0, in_hand: int = 0, share: int = 0, least: int = 0) -> Wish:
    return Wish(KEY, BUDGET.limit, used, in_hand, share, least)


async def told(accounting: Accounting, number: int, *wishes: Wish) -> Answer:
    return (await accounting.exchange(Exchange(number, {}, wishes)))[KEY]


async def state(accounting: Accounting) -> BudgetState:
    (found,) = await accounting.budgets("a", [BUDGET])
    return found


async def test_an_exchange_that_is_repeated_is_applied_once(url: str) -> None:
    async with opened(url) as store:
        accounting = Accounting(store.database, 10.0)
        first = Exchange(1, {ROW: Tally(1, 0, 0, 10, 2, 3, 40)}, (wish(share=500),))
        assert await accounting.exchange(first) == {KEY: Answer(0, 500)}
        assert await accounting.exchange(first) == {KEY: Answer(0, 500)}
        second = Exchange(2, {ROW: Tally(1, 0, 0, 1, 0, 1, 2)}, (wish(used=100, in_hand=50, share=200),))
        for _ in range(2):
            assert await accounting.exchange(second) == {KEY: Answer(100, 200)}
        rows, total = await accounting.usage("a", -math.inf, math.inf, [Dimension.MODEL, Dimension.HOUR], 10)
        assert [(row.group, row.sums) for row in rows] == [(("m", 7200), total)]
        assert total == Tally(2, 0, 0, 11, 2, 4, 42)
        assert (await accounting.usage("a", 10800, math.inf, [], 10))[1] == Tally()
        assert (await accounting.usage("b", -math.inf, math.inf, [], 10))[1] == Tally()


async def test_shares_never_add_up_to_more(shared_url: str) -> None:
    async with opened(shared_url) as one, opened(shared_url) as other:
        a, b = Accounting(one.database, 10.0), Accounting(other.database, 10.0)
        assert await told(a, 1, wish(share=700)) == Answer(0, 700)
        assert await told(b, 1, wish(share=700)) == Answer(0, 300)
        assert await told(b, 2, wish(share=700, least=500)) == Answer(0, 0), "half of what it waits for is no use"
        assert await told(a, 2, wish(used=100, share=400)) == Answer(100, 400)
        assert await told(b, 3, wish(share=700, least=500)) == Answer(100, 500)
        assert (await state(a)).held == 900


async def test_who_is_gone_keeps_nothing_but_what_was_in_hand(shared_url: str) -> None:
    async with opened(shared_url) as one, opened(shared_url) as other:
        a, b = Accounting(one.database, 10.0), Accounting(other.database, 10.0)
        await told(a, 1, wish(share=800))
        await told(a, 2, wish(used=100, in_hand=200, share=600))
        await b.settle_lost()
        assert await told(b, 1, wish(share=1000)) == Answer(100, 300), "its lease holds"
        await silence(other.database, one.database.owner)
        assert (await state(b)).held_by_lost == 600
        await b.settle_lost()
        await b.settle_lost()
        assert await told(b, 2, wish(share=1000)) == Answer(300, 700), "what was in hand counts as spent"
        # It was only slow, and tells what it has really used since.
        assert await told(a, 3, wish(used=150, share=0)) == Answer(250, 0)
        assert await told(b, 3, wish(share=1000)) == Answer(250, 750)
        assert await told(a, 4, wish(share=10)) == Answer(250, 0)


async def silence(database: object, owner: str) -> None:
    """As if its lease had run out."""

    def write(transaction: Transaction) -> None:
        table = schema.accountants
        transaction.connection.execute(update(table).where(table.c.id == owner).values(lease_until=1.0))

    await database.write(write)  # type: ignore[attr-defined]


async def test_a_killed_process_leaves_what_it_had_in_hand_spent(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tasks.db"
    async with opened(url) as store:  # ends without giving anything back
        await told(Accounting(store.database, 10.0), 1, wish(share=800))
        await told(Accounting(store.database, 10.0), 2, wish(used=100, in_hand=200, share=700))
    async with opened(url) as store:
        accounting = Accounting(store.database, 10.0)
        assert (await state(accounting)).held == 700
        await accounting.settle_lost()
        assert await told(accounting, 1, wish(share=1000)) == Answer(300, 700)


async def test_who_leaves_gives_everything_back(url: str) -> None:
    async with opened(url) as store:
        accounting = Accounting(store.database, 10.0)
        accounts = Accounts(Ledger((BUDGET,)), Reckoning(), store.now)
        bookkeeper = Bookkeeper(accounts, accounting, 1e9)
        accounts.ledger.need("a", Amounts(100, 0), store.now())
        await bookkeeper.flush()
        found = accounts.ledger.reserve("a", Amounts(100, 0), store.now())
        assert isinstance(found, Reservation)
        accounts.ledger.settle(found, Amounts(60, 0))
        await bookkeeper.close()
        left = await state(accounting)
        assert (left.spent, left.held) == (60, 0)
        for table in (schema.accountants, schema.budget_shares):
            query = select(table)
            assert not await store.database.read(lambda connection, query=query: connection.execute(query).all())


async def test_ledgers_that_spend_at_random_never_exceed_the_limit(shared_url: str) -> None:
    """Three control planes, each with its own bookkeeper."""
    async with opened(shared_url) as a, opened(shared_url) as b, opened(shared_url) as c:
        dice, spent = random.Random(7), 0
        keepers = [
            Bookkeeper(Accounts(Ledger((BUDGET,)), Reckoning(), store.now), Accounting(store.database, 10.0), 1e9)
            for store in (a, b, c)
        ]

        async def spend(keeper: Bookkeeper) -> None:
            nonlocal spent
            ledger, now = keeper.accounts.ledger, keeper.accounts.now
            for _ in range(60):
                most = Amounts(dice.randint(1, 40), 0)
                found = ledger.reserve("a", most, now())
                if isinstance(found, Reservation):
                    await asyncio.sleep(0)
                    used = Amounts(dice.randint(0, most.nano_usd), 0)
                    spent += used.nano_usd
                    ledger.settle(found, used)
                else:
                    ledger.need("a", most, now())
                    ledger.ask_again()
                    await keeper.flush()

        await asyncio.gather(*(spend(keeper) for keeper in keepers))
        for keeper in keepers:
            await keeper.close()
        found = await state(Accounting(a.database, 10.0))
        assert found.spent == spent <= BUDGET.limit and found.held == 0
        assert spent > 0.9 * BUDGET.limit


async def test_old_usage_is_forgotten(url: str) -> None:
    async with opened(url) as store:
        accounting = Accounting(store.database, 10.0)
        hour = int(store.now()) // 3600 * 3600
        rows = {ROW._replace(hour=hour): Tally(1), ROW._replace(hour=hour - 400 * 3600): Tally(1)}
        await accounting.exchange(Exchange(1, rows))
        await accounting.purge(100 * 3600.0)
        assert (await accounting.usage("a", -math.inf, math.inf, [], 10))[1] == Tally(1)
