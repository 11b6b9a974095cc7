"""Several processes on one PostgreSQL: leases, claims, what they hear of each other; and its death."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, select, update

from control_plane.domain.errors import DomainError
from control_plane.tasks import schema
from control_plane.tasks.location import StoreError, located
from control_plane.tasks.model import Changes, Filter, LaneId, TaskId, TaskState
from control_plane.tasks.opening import open_store
from control_plane.tasks.store import SqlTaskStore
from control_plane.tasks.transaction import Transaction
from tests.harness.postgres import Postgres, postgres
from tests.harness.programs import until
from tests.harness.task_store import PLACE, TENANT, claim, new_task, opened


@pytest.fixture
async def url(postgres_server: Postgres) -> str:
    return await postgres_server.tables()


async def test_a_task_that_another_replica_gives_back_keeps_its_place(url: str) -> None:
    async with opened(url) as a, opened(url) as b:
        ids = [(await a.submit(new_task())).record.id for _ in range(6)]
        (lane,) = await a.waiting_lanes()
        (first,) = await b.claim(lane.id, [PLACE])
        assert [claimed.id for claimed in await a.claim(lane.id, [PLACE] * 2)] == ids[1:3]
        heard = asyncio.Event()
        a.listen(lambda changes: heard.set() if lane.id in changes.returned else None)
        assert await b.give_back(first.id, first.epoch, "DRAINING")
        async with asyncio.timeout(10):
            await heard.wait()
        assert [claimed.id for claimed in await a.claim(lane.id, [PLACE] * 2)] == [ids[0], ids[3]]


async def test_a_task_that_came_back_unheard_is_found_when_nothing_else_is_there(url: str) -> None:
    async with opened(url) as a:
        ids = [(await a.submit(new_task())).record.id for _ in range(3)]
        (lane,) = await a.waiting_lanes()
        (first, _) = await a.claim(lane.id, [PLACE] * 2)
        connection = await asyncpg.connect(url)
        await connection.execute("UPDATE tasks SET state = 1, owner = NULL, epoch = epoch + 1 WHERE id = $1", first.id)
        await connection.close()
        assert [claimed.id for claimed in await a.claim(lane.id, [PLACE] * 2)] == [ids[0], ids[2]]


async def test_what_claims_read_does_not_grow_with_what_is_done(url: str) -> None:
    """The plans of the real statements, where statistics say that every task can start."""
    async with opened(url) as store:
        await asyncio.gather(*(store.submit(new_task()) for _ in range(3000)))
        (lane,) = await store.waiting_lanes()
        connection = await asyncpg.connect(url)
        try:
            await connection.execute("ANALYZE tasks")
            await connection.execute(
                "UPDATE tasks SET state = 4 WHERE id IN (SELECT id FROM tasks ORDER BY id LIMIT 2000)"
            )
            asked: list[tuple[str, Any]] = []
            for engine in (store.database._readers, store.database._writer):  # type: ignore[attr-defined]
                event.listen(
                    engine.sync_engine,
                    "before_cursor_execute",
                    lambda _c, _k, statement, parameters, *_: asked.append((statement, parameters)),
                )
            assert len(await store.waiting_lanes([lane.id])) == 1
            assert await store.waiting_count(lane.id, 10) == 10
            assert len(await store.claim(lane.id, [PLACE])) == 1
            about = [(said, given) for said, given in asked if "FROM tasks" in said and said.startswith("SELECT")]
            assert len(about) >= 3
            for said, given in about:
                plan = await connection.fetch(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {said}", *given)
                lines = "\n".join(row[0] for row in plan)
                assert "Seq Scan on tasks" not in lines and "tasks_pkey" not in lines, lines
                assert "Rows Removed" not in lines, lines
        finally:
            await connection.close()


async def test_replicas_never_claim_the_same_epoch(url: str) -> None:
    async with opened(url) as a, opened(url) as b, opened(url) as c:
        ids = {answer.record.id for answer in await asyncio.gather(*(a.submit(new_task()) for _ in range(120)))}
        (lane,) = await a.waiting_lanes()
        seen: Counter[tuple[TaskId, int]] = Counter()
        done: set[TaskId] = set()
        dice = random.Random(1)

        async def work(store: SqlTaskStore) -> None:
            while len(done) < len(ids):
                claims = await store.claim(lane.id, [PLACE] * dice.randint(1, 6))
                seen.update((claimed.id, claimed.epoch) for claimed in claims)
                for claimed in claims:
                    if dice.random() < 0.2:
                        assert await store.give_back(claimed.id, claimed.epoch, "DRAINING")
                    else:
                        assert await store.succeeded(claimed.id, claimed.epoch, b"", 0)
                        done.add(claimed.id)
                if not claims:
                    await asyncio.sleep(0.005)

        async with asyncio.timeout(30):
            await asyncio.gather(*(work(store) for store in (a, b, c, a, b, c)))
        assert done == ids and max(seen.values()) == 1
        counts = await b.counts(TENANT)
        assert counts[TaskState.SUCCEEDED] == len(ids)
        events, _ = await c.events(TENANT, 0, 10_000)
        assert [event.id for event in events] == list(range(1, len(events) + 1))


async def test_replicas_agree_on_a_key(url: str) -> None:
    async with opened(url) as a, opened(url) as b:
        answers = await asyncio.gather(
            *(store.submit(new_task(f"key-{i % 10}")) for i in range(40) for store in (a, b))
        )
        assert sum(answer.created for answer in answers) == 10
        assert len({answer.record.id for answer in answers}) == 10


async def test_events_become_visible_in_the_order_of_their_ids(url: str) -> None:
    async with opened(url) as a, opened(url) as b, opened(url) as reader:
        writing = [asyncio.create_task(store.submit(new_task())) for store in (a, b) for _ in range(60)]
        seen: list[int] = []
        position = 0
        async with asyncio.timeout(20):
            while len(seen) < len(writing):
                events, position = await reader.events(TENANT, position, 7)
                seen += [event.id for event in events]
        await asyncio.gather(*writing)
        assert seen == list(range(1, len(writing) + 1)), "none was overtaken"


async def test_a_lease_that_ran_out_is_taken_over(url: str) -> None:
    async with opened(url, lease=0.3) as a, opened(url, lease=0.3) as b:
        told: list[Changes] = []
        a.listen(told.append)
        await a.submit(new_task())
        (old,) = await claim(a)
        await b.sweep()
        assert (await b.get(TENANT, old.id)).record.state is TaskState.SCHEDULED
        await a.heartbeat()

        async def taken() -> bool:
            await b.sweep()
            return (await b.get(TENANT, old.id)).record.state is TaskState.QUEUED

        await until(taken)
        full = await b.get(TENANT, old.id)
        assert full.attempts[0].failure_reason == "LEASE_LOST" and full.record.failures == 0
        (new,) = await claim(b)
        assert not await a.started(old.id, old.epoch)
        assert not await a.succeeded(old.id, old.epoch, b"stale", 0)
        await a.heartbeat()
        assert (old.id, old.epoch) in {pair for changes in told for pair in changes.ended}
        assert await b.succeeded(new.id, new.epoch, b"one", 0)


async def test_a_lease_that_is_renewed_holds(url: str) -> None:
    async with opened(url, lease=0.5) as a, opened(url, lease=0.5) as b:
        await a.submit(new_task())
        (claimed,) = await claim(a)
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            await a.heartbeat()
            await b.sweep()
            await asyncio.sleep(0.05)
        assert await a.succeeded(claimed.id, claimed.epoch, b"", 0)


async def test_a_claim_that_nobody_heard_of_is_queued_again(url: str) -> None:
    async with opened(url) as store:
        id = (await store.submit(new_task())).record.id
        lost_answer = await SqlTaskStore.open(store.database)
        assert len(await claim(lost_answer)) == 1
        await store.heartbeat()
        assert (await store.get(TENANT, id)).record.state is TaskState.QUEUED


async def test_what_one_does_the_others_hear(url: str) -> None:
    async with opened(url) as a, opened(url) as b:
        told: list[Changes] = []
        b.listen(told.append)
        # The poll would tell within a second too: what comes sooner was a notification.
        for _ in range(3):
            told.clear()
            before = time.monotonic()
            await a.submit(new_task())
            await until(lambda: _any(changes.lanes and changes.events for changes in told))
            if time.monotonic() - before < 0.4:
                break
        else:
            raise AssertionError("no notification came before the poll")
        (claimed, *_) = await claim(b, 3)
        await a.cancel(TENANT, claimed.id)
        await until(lambda: _any((claimed.id, claimed.epoch) in changes.ended for changes in told))


async def _any(found: Iterator[object]) -> bool:
    return any(found)


async def test_without_notifications_a_look_each_second_finds_the_same(url: str) -> None:
    async with opened(url) as a, opened(url) as b:
        told: list[Changes] = []
        b.listen(told.append)
        await a.submit(new_task())
        await until(lambda: _any(changes.lanes for changes in told))

        def deaf(transaction: Transaction) -> None:
            transaction.connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE query LIKE 'LISTEN%' AND datname = current_database()"
            )

        await a.database.write(deaf)
        told.clear()
        await a.submit(new_task())
        await until(lambda: _any(changes.events and changes.lanes for changes in told), timeout=5)


async def test_tables_are_asked_for(postgres_server: Postgres) -> None:
    empty = postgres_server.url(await postgres_server.new_database())
    with pytest.raises(StoreError, match=r"no tables yet: run `modelyard db upgrade --store postgresql://.*` first"):
        await open_store(located(empty, {}))
    newer = await postgres_server.tables()
    async with opened(newer) as store:
        await store.database.write(
            lambda transaction: (
                transaction.connection.execute(update(schema.alembic_version).values(version_num="9999")) and None
            )
        )
    with pytest.raises(StoreError, match="newer modelyard"):
        await open_store(located(newer, {}))


async def test_a_server_that_is_not_there_is_said_so_without_the_password() -> None:
    with pytest.raises(StoreError) as caught:
        await open_store(located("postgresql://user:hush@127.0.0.1:1/tasks", {}))
    assert "postgresql://user@127.0.0.1:1/tasks" in str(caught.value) and "hush" not in str(caught.value)


async def test_killed_and_started_again_everything_acknowledged_is_there() -> None:
    with postgres() as server:
        url = await server.tables()
        async with opened(url, lease=2.0) as store:
            acknowledged: set[str] = set()
            refused: Counter[str] = Counter()
            slowest = 0.0
            stop = asyncio.Event()

            async def client(number: int) -> None:
                nonlocal slowest
                for i in range(100_000):
                    if stop.is_set():
                        return
                    key = f"{number}-{i}"
                    begin = time.monotonic()
                    try:
                        await store.submit(new_task(key))
                        acknowledged.add(key)
                    except DomainError as error:
                        refused[error.reason] += 1
                        await asyncio.sleep(0.02)
                    slowest = max(slowest, time.monotonic() - begin)

            clients = [asyncio.create_task(client(number)) for number in range(8)]
            for _ in range(2):
                count = len(acknowledged)
                await until(lambda count=count: _any([len(acknowledged) > count + 20]))
                (running, *_) = await store.claim(LaneId(1), [PLACE])
                server.kill()
                failures = refused["STORE_UNAVAILABLE"]
                await until(lambda failures=failures: _any([refused["STORE_UNAVAILABLE"] > failures]))
                with pytest.raises(DomainError) as caught:
                    await store.succeeded(running.id, running.epoch, b"kept in hand", 0)
                assert caught.value.reason == "STORE_UNAVAILABLE" and caught.value.retry_after
                with pytest.raises(DomainError):
                    await store.counts(TENANT)
                server.start()

                async def written(running=running) -> bool:  # type: ignore[no-untyped-def]
                    try:
                        return await store.succeeded(running.id, running.epoch, b"kept in hand", 0)
                    except DomainError:
                        return False

                await until(written)
            stop.set()
            await asyncio.gather(*clients)
            assert set(refused) == {"STORE_UNAVAILABLE"}
            assert slowest < 10
            keys = await store.database.read(
                lambda connection: set(connection.execute(select(schema.tasks.c.idempotency_key)).scalars())
            )
            assert acknowledged <= keys
            done = await store.page(TENANT, Filter(states=(TaskState.SUCCEEDED,)), 10)
            assert len(done) == 2
