"""Durable tasks under real kills, small: `poe faults` has the sizes of the reliability bar."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import scenarios
from tests.faults.scenarios import Database, real_postgres, sqlite

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    return sqlite(tmp_path) if request.param == "sqlite" else real_postgres()


async def test_a_killed_control_plane_loses_no_task(database: Database) -> None:
    report = await scenarios.control_plane_killed(database, tasks=200, kills=2, servers_die=2.0)
    assert not report.violations, report
    assert report.figures["kills"] == 2


async def test_a_killed_database_loses_no_task() -> None:
    report = await scenarios.postgres_killed(real_postgres(), tasks=200, kills=2)
    assert not report.violations, report


async def test_a_dispatcher_that_wakes_up_too_late_cannot_write() -> None:
    report = await scenarios.zombie(real_postgres(), tasks=150, rounds=1, program=scenarios.UNHEEDING)
    assert not report.violations, report
    assert report.figures["stale writes refused"], report  # or nothing was put to the test


async def test_without_the_fence_the_checker_finds_stale_writes() -> None:
    report = await scenarios.zombie(real_postgres(), tasks=150, rounds=1, program=(*scenarios.UNHEEDING, "--unfenced"))
    assert report.violations, report


async def test_replicas_never_take_the_same_task() -> None:
    report = await scenarios.replicas(real_postgres(), tasks=200)
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
