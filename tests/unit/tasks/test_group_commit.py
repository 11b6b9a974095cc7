"""Which commands are tried together, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from control_plane.domain.errors import DomainError
from control_plane.tasks.database import Uncertain, drive
from control_plane.tasks.faults import Fault, fault_of, translated
from control_plane.tasks.transaction import OPERATION, Job


def jobs(count: int) -> list[Job]:
    loop = asyncio.new_event_loop()
    try:
        return [Job(OPERATION, i, loop.create_future()) for i in range(count)]
    finally:
        loop.close()


class Database:
    """Transactions that fail as they are told to, one failure each, then succeed."""

    def __init__(self, *failures: Exception | None, bad: int | None = None) -> None:
        self.failures = list(failures)
        self.bad = bad
        self.tried: list[list[int]] = []

    def __call__(self, some: Sequence[Job]) -> str:
        self.tried.append([job.command for job in some])
        if self.failures:
            failure = self.failures.pop(0)
            if failure:
                raise failure
        if any(job.command == self.bad for job in some):
            raise ValueError("bad command")
        for job in some:
            job.outcome = "done"
        return "changes"


def sqlite_error(code: int, text: str = "it failed") -> OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return OperationalError("INSERT secret prompt", (), error)


def driver_error(state: str | None, dead: bool = False) -> OperationalError:
    class Driver(Exception):
        sqlstate = state

    return OperationalError("INSERT secret prompt", (), Driver("told"), connection_invalidated=dead)


def outcomes(some: Sequence[Job]) -> list[Any]:
    return [job.outcome.reason if isinstance(job.outcome, DomainError) else job.outcome for job in some]


def test_all_in_one() -> None:
    some, database = jobs(5), Database()
    assert drive(some, database) == ["changes"]
    assert database.tried == [[0, 1, 2, 3, 4]] and outcomes(some) == ["done"] * 5


def test_a_bad_command_is_found_and_the_others_go_through() -> None:
    some, database = jobs(3), Database(bad=1)
    assert drive(some, database) == ["changes", "changes"]
    assert database.tried == [[0, 1, 2], [0], [1], [2]]
    assert some[0].outcome == some[2].outcome == "done" and isinstance(some[1].outcome, ValueError)


def test_what_was_in_the_way_of_another_transaction_is_tried_again_together() -> None:
    for failure in (driver_error("40P01"), IntegrityError("", (), Exception("duplicate"))):
        some, database = jobs(3), Database(failure)
        drive(some, database)
        assert database.tried == [[0, 1, 2]] * 2 and outcomes(some) == ["done"] * 3


def test_a_connection_that_was_found_dead_is_replaced_once() -> None:
    some, database = jobs(2), Database(driver_error(None, dead=True))
    drive(some, database)
    assert outcomes(some) == ["done"] * 2
    some, database = jobs(2), Database(*[driver_error(None, dead=True)] * 2)
    drive(some, database)
    assert outcomes(some) == ["STORE_UNAVAILABLE"] * 2 and len(database.tried) == 2


def test_a_commit_whose_end_is_not_known_is_not_repeated() -> None:
    uncertain = Uncertain()
    uncertain.__cause__ = driver_error(None, dead=True)
    some, database = jobs(2), Database(uncertain)
    drive(some, database)
    assert outcomes(some) == ["STORE_UNAVAILABLE"] * 2 and len(database.tried) == 1


def test_a_full_disk_and_a_dead_database_refuse_all() -> None:
    for failure, reason in (
        (sqlite_error(sqlite3.SQLITE_FULL), "STORE_FULL"),
        (driver_error("53100"), "STORE_FULL"),
        (sqlite_error(sqlite3.SQLITE_IOERR), "STORE_UNAVAILABLE"),
        (driver_error("57P01"), "STORE_UNAVAILABLE"),
        (ConnectionRefusedError("no"), "STORE_UNAVAILABLE"),
        (TimeoutError(), "STORE_UNAVAILABLE"),
    ):
        some, database = jobs(3), Database(failure)
        assert drive(some, database) == []
        assert outcomes(some) == [reason] * 3 and len(database.tried) == 1
        assert all(job.outcome.retry_after and "secret" not in job.outcome.message for job in some)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ValueError("a bug"), Fault.COMMAND),
        (DomainError("WRONG_STATE", "no"), Fault.COMMAND),
        (sqlite_error(sqlite3.SQLITE_ERROR), Fault.COMMAND),
        (sqlite_error(sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY), Fault.CONFLICT),
        (sqlite_error(sqlite3.SQLITE_BUSY), Fault.UNAVAILABLE),
        (sqlite_error(sqlite3.SQLITE_CORRUPT), Fault.UNAVAILABLE),
        (driver_error("22021"), Fault.COMMAND),
        (driver_error("40001"), Fault.CONFLICT),
        (driver_error("25P03"), Fault.UNAVAILABLE),
        (driver_error("57014"), Fault.UNAVAILABLE),
        (EOFError(), Fault.UNAVAILABLE),
    ],
)
def test_what_lies_behind_an_error(error: Exception, fault: Fault) -> None:
    assert fault_of(error) is fault
    if fault is Fault.COMMAND:
        assert translated(error) is error
