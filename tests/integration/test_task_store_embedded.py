"""A task store in one file: restarts, a second process, a full disk, clocks, other versions."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import select

from control_plane.domain.errors import DomainError
from control_plane.tasks import schema
from control_plane.tasks.location import SqliteFile, StoreError, located
from control_plane.tasks.model import Filter, TaskState
from control_plane.tasks.opening import open_store
from control_plane.tasks.sqlite import open_sqlite
from control_plane.tasks.store import SqlTaskStore
from control_plane.tasks.transaction import Transaction
from tests.harness.task_store import PLACE, TENANT, claim, new_task, opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "tasks.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


async def test_a_restart_queues_what_was_in_hand(url: str) -> None:
    async with opened(url) as store:
        first = (await store.submit(new_task())).record.id
        second = (await store.submit(new_task())).record.id
        old = await claim(store, 2)
        await store.started(first, 1)
    async with opened(url) as store:
        full = await store.get(TENANT, first)
        assert (full.record.state, full.record.failures, full.record.epoch) == (TaskState.QUEUED, 0, 2)
        assert full.attempts[0].failure_reason == "LEASE_LOST" and full.attempts[0].ended_at is not None
        assert [event.type.name for event in full.history][-1] == "REQUEUED"
        assert not await store.succeeded(old[0].id, old[0].epoch, b"stale", 0)
        again = await claim(store, 2)
        assert [claimed.id for claimed in again] == [first, second], "in their old places"
        assert again[0].failed_models == ()


async def test_a_task_that_was_lost_too_often_fails(url: str) -> None:
    for _ in range(3):
        async with opened(url, max_lost=2) as store:
            if not await store.page(TENANT, Filter(), 1):
                await store.submit(new_task())
            assert len(await claim(store)) == 1
    async with opened(url, max_lost=2) as store:
        (record,) = await store.page(TENANT, Filter(), 1)
        assert (record.state, record.failure_reason) == (TaskState.FAILED, "LEASE_LOST")
        belief = await store.database.read(
            lambda connection: connection.execute(select(schema.beliefs.c.value)).scalar()
        )
        assert '"failed"' in belief
        assert (await store.retry(TENANT, record.id)).state is TaskState.QUEUED


async def test_the_file_belongs_to_one_process_and_its_owner(url: str, path: Path) -> None:
    async with opened(url) as store:
        with pytest.raises(StoreError, match=rf"in use by another control plane \(pid {os.getpid()}\)"):
            await open_store(located(url, {}))
        upgrade = subprocess.run(
            [sys.executable, "-m", "modelyard.cli", "db", "upgrade", "--store", url], capture_output=True, text=True
        )
        assert upgrade.returncode == 2 and "in use" in upgrade.stderr
        await store.submit(new_task())
        for ending in ("", "-wal", ".lock"):
            assert stat.S_IMODE(Path(f"{path}{ending}").stat().st_mode) == 0o600
    async with opened(url):
        pass


async def test_a_full_disk_refuses_writes_and_recovers(url: str) -> None:
    def limit(pages: int) -> object:
        def set_limit(transaction: Transaction) -> None:
            transaction.connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        return set_limit

    async with opened(url) as store:
        await store.database.write(limit(200))  # type: ignore[arg-type]
        accepted = []
        with pytest.raises(DomainError) as caught:
            for i in range(1000):
                accepted.append((await store.submit(new_task(f"k{i}", b"x" * 20_000))).record.id)
        assert (caught.value.reason, bool(caught.value.retry_after)) == ("STORE_FULL", True)
        assert accepted
        with pytest.raises(DomainError):
            await store.submit(new_task("more", b"x" * 20_000))

        def operation(transaction: Transaction) -> None:
            big = {"task_id": "big", "spec": b"x" * 100_000}
            transaction.connection.execute(schema.payloads.insert(), big)

        with pytest.raises(DomainError) as caught:
            await store.database.write(operation)
        assert caught.value.reason == "STORE_FULL"
        assert len(await store.page(TENANT, Filter(), 1000)) == len(accepted)
        assert (await store.get(TENANT, accepted[-1])).spec == b"x" * 20_000
        await store.database.write(limit(100_000))  # type: ignore[arg-type]
        assert (await store.submit(new_task("more", b"x" * 20_000))).created
        assert (await store.counts(TENANT))[TaskState.QUEUED] == len(accepted) + 1
        assert [claimed.id for claimed in await claim(store, len(accepted))] == accepted


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_was_taken_away_acknowledges_nothing(url: str, path: Path, replaced: bool) -> None:
    async with opened(url) as store:
        kept = (await store.submit(new_task())).record.id
        path.rename(path.with_name("elsewhere"))
        if replaced:
            path.touch()
        for call in (store.submit(new_task()), store.counts(TENANT)):
            with pytest.raises(DomainError, match="was removed or replaced: restore it") as caught:
                await call
            assert caught.value.reason == "STORE_UNAVAILABLE"
        path.with_name("elsewhere").replace(path)
        await store.submit(new_task())
        assert len(await claim(store, 9)) == 2
        assert (await store.get(TENANT, kept)).record.state is TaskState.SCHEDULED


async def test_a_commit_into_a_file_that_was_taken_away_is_not_acknowledged(url: str, path: Path) -> None:
    def take_away(transaction: Transaction) -> None:
        path.unlink()

    async with opened(url) as store:
        with pytest.raises(DomainError, match="removed or replaced"):
            await store.database.write(take_away)


@pytest.mark.parametrize("table", ["songs (title)", "tasks (id, title)", "alembic_version (version_num)"])
async def test_a_file_of_another_program_is_left_as_it_is(url: str, path: Path, table: str) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE {table}")
        if "version_num" in table:
            connection.execute("INSERT INTO alembic_version VALUES ('0001')")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="is a database of another program: give tasks a file of their own"):
        await open_store(located(url, {}))
    assert path.read_bytes() == before


@dataclass
class Clock:
    wall_time: float = 1.8e9
    elapsed: float = 0.0

    def wall(self) -> float:
        return self.wall_time

    def monotonic(self) -> float:
        return self.elapsed


async def open_with(path: Path, clock: Clock) -> SqlTaskStore:
    path.parent.mkdir(exist_ok=True)
    return await SqlTaskStore.open(await open_sqlite(SqliteFile(path), "owner", clock))


async def test_a_jump_of_the_wall_clock_changes_nothing(path: Path) -> None:
    clock = Clock()
    store = await open_with(path, clock)
    begin = store.now()
    id = (await store.submit(new_task(deadline=begin + 100))).record.id
    later = (await store.submit(new_task(not_before=begin + 100))).record.id
    for jump in (3600, -7200):
        clock.wall_time += jump
        assert store.now() == begin
        await store.sweep()
        assert (await store.get(TENANT, id)).record.state is TaskState.QUEUED
        assert (await store.get(TENANT, later)).record.ready_at == begin + 100
    clock.elapsed += 100.5
    await store.sweep()
    assert (await store.get(TENANT, id)).record.state is TaskState.EXPIRED
    assert (await claim(store))[0].id == later
    await store.close()


async def test_ids_grow_though_the_clock_was_set_back_between_two_runs(path: Path) -> None:
    ids = []
    for hour in (3, 2, 1):
        store = await open_with(path, Clock(1.8e9 + 3600 * hour))
        ids += [(await store.submit(new_task())).record.id for _ in range(3)]
        await store.close()
    assert ids == sorted(ids)


async def test_what_is_no_database_of_ours_is_refused(url: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(StoreError, match=r"tasks\.db.*not a database"):
        await open_store(located(url, {}))
    path.unlink()
    (path.parent / "tasks.db").mkdir()
    with pytest.raises(StoreError, match="directory"):
        await open_store(located(url, {}))


async def test_a_newer_database_is_refused_and_left_alone(url: str, path: Path) -> None:
    async with opened(url):
        pass
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(StoreError, match="newer modelyard"):
        await open_store(located(url, {}))


async def test_reads_go_on_while_a_transaction_waits(url: str) -> None:
    """A long transaction of the writer stops no reader."""
    entered, leave = threading.Event(), threading.Event()

    def slow(transaction: Transaction) -> None:
        entered.set()
        assert leave.wait(10)

    async with opened(url) as store:
        await store.submit(new_task())
        writing = asyncio.create_task(store.database.write(slow))
        await asyncio.to_thread(entered.wait, 10)
        assert (await store.counts(TENANT))[TaskState.QUEUED] == 1
        assert not writing.done()
        leave.set()
        await writing


async def test_deferred_tasks_do_not_slow_claims(url: str) -> None:
    """They are not in the index that a claim walks."""
    async with opened(url) as store:
        await store.submit(new_task())
        (lane,) = await store.waiting_lanes()

        def plan(transaction: Transaction) -> str:
            query = "EXPLAIN QUERY PLAN SELECT * FROM tasks WHERE lane_id = 1 AND state = 1 ORDER BY id LIMIT 5"
            return " ".join(str(row) for row in transaction.connection.exec_driver_sql(query))

        told = await store.database.write(plan)
        assert "tasks_startable" in told and "TEMP B-TREE" not in told
        assert len(await store.claim(lane.id, [PLACE] * 5)) == 1


async def test_lanes_that_nobody_needs_are_forgotten(path: Path) -> None:
    clock = Clock()
    store = await open_with(path, clock)

    async def lanes() -> int:
        return len(await store.database.read(lambda connection: connection.execute(select(schema.lanes)).all()))

    kept = (await store.submit(new_task())).record
    gone = (await store.submit(new_task(tenant="other"))).record
    await store.cancel(gone.tenant, gone.id)
    await store.delete(gone.tenant, gone.id)
    await store.forget_lanes()
    assert await lanes() == 2
    clock.elapsed += 25 * 3600
    await store.forget_lanes()
    assert await lanes() == 1
    assert (await claim(store))[0].id == kept.id
    await store.submit(new_task(tenant="other"))
    assert {waiting.lane.tenant for waiting in await store.waiting_lanes()} == {"other"}
    assert await lanes() == 2
    await store.close()
