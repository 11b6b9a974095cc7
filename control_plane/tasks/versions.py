"""Which version of the tables a database has, and bringing it up to date.

Alembic is imported only where there is something to migrate: it takes 11 MB and 0.2 s.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, insert, inspect, select

from control_plane.tasks.location import StoreError
from control_plane.tasks.schema import REVISION, alembic_version, counters, for_postgresql, metadata


def upgrade_command(shown: str) -> str:
    """What brings up to date the tables of a store, as people type it."""
    return f"modelyard db upgrade --store {shlex.quote(shown)}"


@dataclass(frozen=True, slots=True)
class Version:
    """Of a database."""

    current: str
    """Revision of its tables; empty: it has none."""
    newest: str = REVISION
    """That this program knows."""

    @property
    def newer(self) -> bool:
        """A later program has been there. Revisions are numbered."""
        return self.current > self.newest

    @property
    def up_to_date(self) -> bool:
        return self.current == self.newest


def version(connection: Connection) -> Version:
    """Of the database behind a connection."""
    if not inspect(connection).has_table(alembic_version.name):
        return Version("")
    return Version(connection.execute(select(alembic_version.c.version_num)).scalar() or "")


def check(found: Version, shown: str) -> None:
    """Raises StoreError unless the tables are those of this program."""
    if found.newer:
        raise StoreError(
            f"tasks.store {shown} has the tables of a newer modelyard (schema {found.current}, this one knows "
            f"{found.newest}): install that one"
        )
    if not found.up_to_date:
        state = f"schema {found.current} instead of {found.newest}" if found.current else "no tables yet"
        raise StoreError(f"tasks.store {shown} has {state}: run `{upgrade_command(shown)}` first")


def bring_up_to_date(connection: Connection, shown: str) -> Version:
    """Make or migrate the tables; the version before. Raises StoreError if the database is newer."""
    with connection.begin():
        found = version(connection)
    if found.newer:
        check(found, shown)
    if not found.current:
        with connection.begin():
            create(connection)
    elif not found.up_to_date:
        migrate(connection)
    return found


def create(connection: Connection) -> None:
    """All tables in an empty database, as they are after the newest migration."""
    if connection.dialect.name == "postgresql":
        for_postgresql()
    metadata.create_all(connection)
    alembic_version.create(connection)
    connection.execute(insert(alembic_version).values(version_num=REVISION))
    connection.execute(insert(counters).values(id=1, events=0, beliefs=0))


def migrate(connection: Connection, to: str = "head") -> None:
    """Run the migrations that are missing, each in a transaction or all in one, as the database can."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, to)
