"""The embedded database: one SQLite file that belongs to one process.

One thread writes, a few read what is committed. Every commit is on disk (WAL, synchronous=FULL) before it is answered.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.pool import QueuePool, StaticPool

from control_plane.domain.ports import Clock
from control_plane.tasks import versions
from control_plane.tasks.database import Database, drive, transact
from control_plane.tasks.faults import brief, translated
from control_plane.tasks.location import SqliteFile, StoreError
from control_plane.tasks.model import Changes
from control_plane.tasks.schema import alembic_version, lanes, payloads, tasks
from control_plane.tasks.transaction import Job
from control_plane.tasks.versions import Version

T = TypeVar("T")

_READERS = 3
_OURS = frozenset({tasks.name, payloads.name, lanes.name})
"""Tables of every schema."""
_ANOTHER_FILE = "a file of their own (--tasks.store sqlite:///OTHER, for `modelyard up` --store sqlite:///OTHER)"
_OLDEST = (3, 35, 0)
"""UPDATE FROM, RETURNING."""


class SqliteDatabase(Database):
    """See `Database`. Its clock is the wall's at the start and monotonic from there."""

    def __init__(self, path: Path, owner: str, clock: Clock, writer: Engine, readers: Engine, lock: IO[bytes]) -> None:
        super().__init__(owner)
        self._path = path
        self._file = _identity(path)
        self._clock = clock
        self._writer = writer
        self._readers = readers
        self._lock = lock
        self._offset = clock.wall() - clock.monotonic()
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="tasks-reader")
        self._handed: SimpleQueue[list[Job] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="tasks-writer", daemon=True)
        self._thread.start()

    @property
    def shared(self) -> bool:
        return False

    def now(self) -> float:
        return self._clock.monotonic() + self._offset

    async def read(self, operation: Callable[[Connection], T]) -> T:
        if self._closing:
            raise translated(OSError("it is closed"))

        def call() -> T:
            self._check_in_place()
            with self._readers.connect() as connection:
                return operation(connection)

        try:
            return await self._loop.run_in_executor(self._pool, call)
        except Exception as error:
            told = translated(error)
            if told is error:
                raise
            raise told from None

    def _start(self, jobs: list[Job]) -> None:
        self._handed.put(jobs)

    def _write(self) -> None:
        """Life of the writer's thread."""
        with self._writer.connect() as connection:
            while (jobs := self._handed.get()) is not None:
                changes: list[Changes | None] = []
                try:
                    changes = drive(jobs, lambda some: self._transact(connection, some))
                except BaseException as error:  # nobody may wait for ever
                    for job in jobs:
                        job.outcome = error
                finally:
                    self._loop.call_soon_threadsafe(self._finished, jobs, [one for one in changes if one])

    def _transact(self, connection: Connection, jobs: Sequence[Job]) -> Changes | None:
        self._check_in_place()
        changes = transact(connection, jobs, self.now())
        self._check_in_place()  # what is in a file without a name is gone at the next start: it must not be answered
        return changes

    def _check_in_place(self) -> None:
        """Raises OSError if the open file is not the one that its path names any more; takes microseconds."""
        if _identity(self._path) != self._file:
            raise OSError(f"the file {self._path} was removed or replaced: restore it, or restart the control plane")

    async def _close(self) -> None:
        self._handed.put(None)
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        self._thread.join()
        self._pool.shutdown()
        self._readers.dispose()
        self._writer.dispose()  # last, so that SQLite empties its log into the file
        self._lock.close()


def _identity(path: Path) -> tuple[int, int] | None:
    """Of the file that a path names, if there is one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class SystemClock:
    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


async def open_sqlite(place: SqliteFile, owner: str, clock: Clock | None = None) -> SqliteDatabase:
    """Open the file, made if it is not there, its tables brought up to date. Raises StoreError."""
    writer, readers, lock = await asyncio.to_thread(_open, place)
    return SqliteDatabase(place.path, owner, clock or SystemClock(), writer, readers, lock)


def _open(place: SqliteFile) -> tuple[Engine, Engine, IO[bytes]]:
    lock, writer, _ = _ready(place)
    return writer, engine(place.path, write=False), lock


def upgrade(place: SqliteFile) -> tuple[Version, Version]:
    """Bring the tables up to date; the versions before and after. Raises StoreError."""
    lock, writer, before = _ready(place)
    writer.dispose()
    lock.close()
    return before, Version(before.newest)


def status(place: SqliteFile) -> Version:
    """Which tables the file has, also while a control plane uses it. Raises StoreError, also where they are foreign."""
    if not place.path.exists():
        return Version("")
    reader = engine(place.path, write=False)
    try:
        with reader.connect() as connection:
            names = set(inspect(connection).get_table_names())
            found = versions.version(connection)
            ours = names >= _OURS if found.current else names <= {alembic_version.name}
            if not ours:
                raise StoreError(
                    f"tasks.store {place.shown} is a database of another program: give tasks "
                    f"{_ANOTHER_FILE}; it is made if it is not there"
                )
            return found
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"tasks.store {place.shown}: {brief(error)}") from None
    finally:
        reader.dispose()


def _ready(place: SqliteFile) -> tuple[IO[bytes], Engine, Version]:
    """Lock the file and bring its tables up to date. Raises StoreError."""
    if sqlite3.sqlite_version_info < _OLDEST:
        raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old for tasks: 3.35 or newer is needed")
    try:
        place.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = _locked(place)
    except OSError as error:
        raise StoreError(f"tasks.store {place.shown}: {error.strerror or error}") from None
    writer = engine(place.path, write=True)
    try:
        status(place)  # reading, before a connection that writes changes anything
        with writer.connect() as connection:
            return lock, writer, versions.bring_up_to_date(connection, place.shown)
    except Exception as error:
        writer.dispose()
        lock.close()
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"tasks.store {place.shown}: {brief(error)}") from None


def _locked(place: SqliteFile) -> IO[bytes]:
    """The lock of the file, until it is closed or this process ends. Raises StoreError, OSError."""
    # What people wrote to models is nobody else's business: both files are for their owner alone.
    os.close(os.open(place.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    name = f"{place.path}.lock"
    file = open(os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0)  # noqa: SIM115, PTH123
    try:
        _lock(file)
    except OSError:
        other = file.read(20).decode("ascii", "replace").strip()
        file.close()
        raise StoreError(
            f"tasks.store {place.shown} is in use by another control plane{f' (pid {other})' if other else ''}; "
            f"give the tasks of this one {_ANOTHER_FILE}, or share a PostgreSQL database"
        ) from None
    file.truncate(0)
    file.write(b"%d\n" % os.getpid())
    return file


def _lock(file: IO[bytes]) -> None:
    if os.name == "nt":
        import msvcrt

        file.seek(2**30)  # far behind what is read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        file.seek(0)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def engine(path: Path, *, write: bool) -> Engine:
    """Connections to the file, explicit transactions."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, cached_statements=512, timeout=5
        )
        for pragma in _WRITER if write else _READER:
            connection.execute(f"PRAGMA {pragma}").fetchall()
        return connection

    pool: dict[str, Any] = {"poolclass": StaticPool}
    if not write:
        pool = {"poolclass": QueuePool, "pool_size": _READERS, "max_overflow": 0}
    made = create_engine("sqlite://", creator=connect, **pool)
    begin = "BEGIN IMMEDIATE" if write else "BEGIN"
    event.listen(made, "begin", lambda connection: connection.exec_driver_sql(begin))
    return made


_WRITER = (
    "journal_mode = WAL",
    "synchronous = FULL",
    "fullfsync = 1",  # macOS: through the cache of the disk
    "cache_size = -16000",  # KiB; taken as it is needed
    "journal_size_limit = 67108864",
    "temp_store = MEMORY",
)
_READER = ("query_only = 1", "cache_size = -2000", "temp_store = MEMORY")
