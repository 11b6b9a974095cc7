"""A database behind one small face: typed commands through one group-commit writer, reads, the clock, changes.

    row = await database.read(lambda connection: connection.execute(...).one())
    await database.write(lambda transaction: transaction.believe(...))     # with a savepoint of its own
    task = await database.apply(SUBMIT, new_task)                          # with others of its kind

What has waited while a transaction was committed is the next transaction. Nothing sleeps to gather more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from control_plane.tasks.faults import Fault, fault_of, translated, unavailable
from control_plane.tasks.model import Changes
from control_plane.tasks.transaction import OPERATION, Batch, Job, Transaction, apply

log = logging.getLogger(__name__)

T = TypeVar("T")
C = TypeVar("C")
R = TypeVar("R")

_MOST_JOBS = 1024
"""Commands of one transaction."""


class Uncertain(Exception):
    """The commit itself failed: whether the transaction is on disk is not known. The cause is the failure."""


class Database(ABC):
    """An open database. Made and used on one event loop.

    Every method raises DomainError STORE_UNAVAILABLE when the database does not answer, and a writing one STORE_FULL
    when its disk is full.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        """Names this process in the database: the one that holds a claimed task."""
        self.committed: Callable[[float], object] | None = None
        """Told, after every transaction, how many seconds it took."""
        self._loop = asyncio.get_running_loop()
        self._told: list[Callable[[Changes], None]] = []
        self._waiting: list[Job] = []
        self._busy = False
        self._started_at = 0.0
        self._closing = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    # ----------------------------------------------------------------- face ---

    @property
    @abstractmethod
    def shared(self) -> bool:
        """Other processes may use it at the same time: leases count."""

    @abstractmethod
    def now(self) -> float:
        """Seconds since the epoch by the database's clock; never jumps back while this process runs."""

    @abstractmethod
    async def read(self, operation: Callable[[Connection], T]) -> T:
        """The value of `operation`, called elsewhere with a connection that sees one moment and must not write."""

    async def write(self, operation: Callable[[Transaction], T]) -> T:
        """Run an operation in a transaction with others; what it returns holds when this returns.

        What it raises undoes what it has done, and nothing else. It may run twice, if the first transaction fails.
        """
        result: T = await self.apply(OPERATION, operation)
        return result

    async def apply(self, batch: Batch[C, R], command: C) -> R:
        """Apply a command; on disk when this returns. One whose caller is cancelled may be applied nevertheless."""
        if self._closing:
            raise unavailable("this control plane is closing it")
        future: asyncio.Future[R] = self._loop.create_future()
        job = Job(batch, command, future)
        if not self._waiting and not self._busy:
            # At the end of this turn of the loop: who was woken by the last commit shall share the next.
            self._loop.call_soon(self._next)
        self._waiting.append(job)
        self._quiet.clear()
        return await future

    def listen(self, told: Callable[[Changes], None]) -> Callable[[], None]:
        """Be told of changes, on the event loop, after they were committed. Call what is returned to stop."""
        self._told.append(told)

        def stop() -> None:
            if told in self._told:
                self._told.remove(told)

        return stop

    async def close(self) -> None:
        """Finish what waits and close. Idempotent."""
        if not self._closing:
            self._closing = True
            await self._quiet.wait()
            await self._close()

    # ------------------------------------------------------ group commit ---

    @abstractmethod
    def _start(self, jobs: list[Job]) -> None:
        """Commit these elsewhere, then call `_finished` on the loop."""

    @abstractmethod
    async def _close(self) -> None: ...

    def _next(self) -> None:
        if self._busy:
            return
        if not self._waiting:
            self._quiet.set()
            return
        jobs, self._waiting = self._waiting[:_MOST_JOBS], self._waiting[_MOST_JOBS:]
        self._busy = True
        self._started_at = time.monotonic()
        self._start(jobs)

    def _finished(self, jobs: Sequence[Job], changes: Sequence[Changes]) -> None:
        if self.committed:
            self.committed(time.monotonic() - self._started_at)
        for job in jobs:
            if job.future.done():  # its caller is gone
                continue
            if isinstance(job.outcome, BaseException):
                job.future.set_exception(job.outcome)
            else:
                job.future.set_result(job.outcome)
        for change in changes:
            self._tell(change)
        self._busy = False
        # Those that were woken just now come first.
        self._loop.call_soon(self._next)

    def _tell(self, changes: Changes) -> None:
        for told in tuple(self._told):
            try:
                told(changes)
            except Exception:
                log.exception("a listener for changes of the task store failed")


def transact(
    connection: Connection, jobs: Sequence[Job], now: float, finish: Callable[[Transaction], None] | None = None
) -> Changes | None:
    """One transaction with these commands; what it has changed. Raises what went wrong, with nothing written, or
    Uncertain."""
    transaction = Transaction(connection, now)
    scope = connection.begin()
    try:
        apply(transaction, jobs)
        if finish:
            finish(transaction)
    except BaseException:
        with contextlib.suppress(Exception):  # what is wrong is known, and the connection may be gone
            scope.rollback()
        raise
    try:
        scope.commit()
    except Exception as error:
        with contextlib.suppress(Exception):
            scope.rollback()
        raise Uncertain from error
    for call in transaction.after_commit:
        call()
    return transaction.changes.frozen() if transaction.changes else None


def tries(jobs: Sequence[Job]) -> Generator[Sequence[Job], Exception | None, None]:
    """Which commands to try in one transaction. To be sent what it failed with, or None; sets outcomes of those that
    failed for good."""
    failure = yield jobs
    if failure is None:
        return
    if _worth_repeating(failure):
        failure = yield jobs
        if failure is None:
            return
    cause = _cause(failure)
    if len(jobs) > 1 and fault_of(cause) in (Fault.CONFLICT, Fault.COMMAND):
        for job in jobs:
            yield from tries([job])
        return
    told = translated(cause)
    for job in jobs:
        job.outcome = told


def _cause(failure: BaseException) -> BaseException:
    return failure.__cause__ if isinstance(failure, Uncertain) and failure.__cause__ else failure


def _worth_repeating(failure: BaseException) -> bool:
    """The connection was dead before anything was written, or another transaction was in the way."""
    if isinstance(failure, Uncertain):
        return fault_of(_cause(failure)) is Fault.CONFLICT
    if fault_of(failure) is Fault.CONFLICT:
        return True
    return isinstance(failure, DBAPIError) and failure.connection_invalidated


def drive(jobs: Sequence[Job], once: Callable[[Sequence[Job]], Any]) -> list[Any]:
    """Try as `tries` says; what `once` returned for every transaction that succeeded."""
    plan = tries(jobs)
    results = []
    failure: Exception | None = None
    todo = next(plan)
    while True:
        try:
            results.append(once(todo))
            failure = None
        except Exception as error:
            failure = error
        try:
            todo = plan.send(failure)
        except StopIteration:
            return results
