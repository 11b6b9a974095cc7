"""Durable tasks under real kills, small: `poe faults` has the sizes of the reliability bar."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.faults import scenarios
from tests.faults.scenarios import Database, real_postgres, sqlite
from tests.harness.postgres import Postgres

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def shared(postgres_server: Postgres) -> Database:
    """A database of the server that all tests share: for those that do it no harm."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[tuple[str, Postgres]]:
        yield await postgres_server.tables(), postgres_server

    return opened


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    return sqlite(tmp_path) if request.param == "sqlite" else request.getfixturevalue("shared")


async def test_a_killed_control_plane_loses_no_task(database: Database) -> None:
    report = await scenarios.control_plane_killed(database, tasks=200, kills=2, servers_die=2.0)
    assert not report.violations, report
    assert report.figures["kills"] == 2


async def test_a_killed_database_loses_no_task() -> None:
    report = await scenarios.postgres_killed(real_postgres(), tasks=200, kills=2)
    assert not report.violations, report


async def test_a_dispatcher_that_wakes_up_too_late_cannot_write(shared: Database) -> None:
    report = await scenarios.zombie(shared, tasks=150, rounds=1, program=scenarios.UNHEEDING)
    assert not report.violations, report
    assert report.figures["stale writes refused"], report  # or nothing was put to the test


async def test_without_the_fence_the_checker_finds_stale_writes(shared: Database) -> None:
    report = await scenarios.zombie(shared, tasks=150, rounds=1, program=(*scenarios.UNHEEDING, "--unfenced"))
    assert report.violations, report


async def test_replicas_never_take_the_same_task(shared: Database) -> None:
    report = await scenarios.replicas(shared, tasks=200)
    assert not report.violations, report


async def test_one_key_is_one_task(database: Database) -> None:
    report = await scenarios.same_key(database)
    assert not report.violations, report


async def test_streams_of_killed_model_servers_end_at_once_and_with_the_truth() -> None:
    report = await scenarios.model_servers_killed(kills=8)
    assert not report.violations, report


async def test_peers_that_stand_still_are_noticed() -> None:
    report = await scenarios.half_open()
    assert not report.violations, report
