"""The tables: migrations and `schema.py` agree, every released schema comes forward, `modelyard db` says how it is."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, inspect, text

from control_plane import db
from control_plane.tasks import schema, versions
from control_plane.tasks.location import PostgresDatabase, SqliteFile, StoreError, located
from control_plane.tasks.opening import open_store
from control_plane.tasks.postgresql import _administer
from control_plane.tasks.sqlite import engine
from tests.harness.postgres import Postgres
from tests.harness.task_store import TENANT, claim, new_task, opened

RELEASED = ("0001", "0002", "0003", "0004", "0005")
"""Schemas that a released program has made. Never shorter."""

DATABASES = ("sqlite", "postgresql")


async def on(kind: str, request: pytest.FixtureRequest, tmp_path: Path, work: Any) -> tuple[Any, str]:
    """What `work` returns on a connection to an empty database, and its URL."""
    if kind == "sqlite":
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.db"
        with engine(path, write=True).connect() as connection:
            return work(connection), f"sqlite:///{path}"
    server: Postgres = request.getfixturevalue("postgres_server")
    url = server.url(await server.new_database())
    return await _administer(PostgresDatabase(url, url), work), url


def described(connection: Connection) -> dict[str, Any]:
    """Tables, columns and indexes as the database describes them."""
    looked = inspect(connection)
    found: dict[str, Any] = {}
    for table in looked.get_table_names():
        found[table] = {
            "columns": {c["name"]: (str(c["type"]), c["nullable"]) for c in looked.get_columns(table)},
            "key": looked.get_pk_constraint(table)["constrained_columns"],
            "unique": sorted(tuple(u["column_names"]) for u in looked.get_unique_constraints(table)),
            "indexes": {
                str(i["name"]): (i["column_names"], i["unique"], {k: str(v) for k, v in i["dialect_options"].items()})
                for i in looked.get_indexes(table)
            },
        }
    if connection.dialect.name == "sqlite":
        rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql LIKE '%WITHOUT ROWID%'"))
        found["without rowid"] = sorted(row.name for row in rows)
    found["counters"]["rows"] = [tuple(row) for row in connection.execute(text("SELECT * FROM counters"))]
    return found


@pytest.mark.parametrize("kind", DATABASES)
async def test_migrations_and_schema_agree(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    def migrated(connection: Connection) -> dict[str, Any]:
        versions.migrate(connection)
        return described(connection)

    def created(connection: Connection) -> dict[str, Any]:
        with connection.begin():
            versions.create(connection)
        return described(connection)

    by_migrations, _ = await on(kind, request, tmp_path, migrated)
    at_once, _ = await on(kind, request, tmp_path, created)
    assert by_migrations == at_once
    assert set(schema.metadata.tables) == set(at_once) - {"alembic_version", "without rowid", "sqlite_sequence"}


def test_the_newest_migration_is_the_schema() -> None:
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(versions.__file__).with_name("migrations")))
    assert scripts.get_heads() == [schema.REVISION]
    revisions = [script.revision for script in scripts.walk_revisions()]
    assert revisions == sorted(revisions, reverse=True), "numbered: they are compared as texts"
    assert set(RELEASED) <= set(revisions) and schema.REVISION in RELEASED


@pytest.mark.parametrize("released", RELEASED)
@pytest.mark.parametrize("kind", DATABASES)
async def test_every_released_schema_comes_forward(
    kind: str, released: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    _, url = await on(kind, request, tmp_path, lambda connection: versions.migrate(connection, released))
    assert await asyncio.to_thread(db.main, ["upgrade", "--store", url]) == 0
    async with opened(url) as store:
        id = (await store.submit(new_task())).record.id
        (claimed,) = await claim(store)
        assert await store.succeeded(id, claimed.epoch, b"result", 0)
        assert (await store.get(TENANT, id)).result == b"result"


# ------------------------------------------------------------------- CLI ---


@pytest.mark.parametrize("kind", DATABASES)
async def test_db_status_and_upgrade(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = await on(kind, request, tmp_path, lambda connection: None)

    async def run(*arguments: str) -> tuple[int, str]:
        status = await asyncio.to_thread(db.main, [*arguments, "--store", url])
        return status, capsys.readouterr().out

    status, told = await run("status", "--json")
    facts = json.loads(told)
    assert (status, facts["schema"], facts["newest"], facts["up_to_date"]) == (1, None, schema.REVISION, False)
    hint = f"run `modelyard db upgrade --store {located(url, {}).shown}`"
    assert hint in (await run("status"))[1]
    if kind == "postgresql":
        with pytest.raises(StoreError, match=re.escape(hint)):
            await open_store(located(url, {}))
    assert json.loads((await run("upgrade", "--json"))[1])["schema"] == schema.REVISION
    assert (await run("upgrade"))[1].endswith("up to date\n")
    assert (await run("status"))[0] == 0


def test_db_takes_the_store_from_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "yard.yaml"
    file.write_text(f"control_plane: {{tasks: {{store: 'sqlite:///{tmp_path}/set.db'}}}}")
    line = [sys.executable, "-m", "modelyard.cli", "--config", str(file), "db", "upgrade"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "set.db").exists(), done.stderr


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mysql://x/y", "unknown kind 'mysql'"),
        ("sqlite:///", "needs the path of a file"),
        ("postgresql://user:hush@127.0.0.1:1/tasks", "postgresql://user@127.0.0.1:1/tasks"),
    ],
)
def test_db_says_what_is_wrong(url: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert db.main(["status", "--json", "--store", url]) == 2
    out, err = capsys.readouterr()
    assert told in err and told in json.loads(out)["error"]["message"] and "hush" not in out + err


def test_alembic_is_imported_only_to_migrate(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\n"
        "from control_plane.tasks.location import located\n"
        "from control_plane.tasks.opening import open_store\n"
        "async def main():\n"
        f"    store = await open_store(located('sqlite:///{tmp_path}/tasks.db', {{}}))\n"
        "    await store.close()\n"
        "asyncio.run(main())\n"
        "print(sorted({'alembic', 'asyncpg', 'greenlet'} & sys.modules.keys()))"
    )
    for _ in range(2):  # made, then opened
        done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == "[]"


def test_a_file_is_looked_at_while_it_is_in_use(tmp_path: Path) -> None:
    place = SqliteFile(tmp_path / "tasks.db")
    from control_plane.tasks import sqlite

    lock, writer, before = sqlite._ready(place)
    try:
        assert before.current == "" and sqlite.status(place).up_to_date
    finally:
        writer.dispose()
        lock.close()
