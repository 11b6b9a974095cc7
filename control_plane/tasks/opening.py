"""Open the task store that a setting names."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable
from importlib.util import find_spec

from control_plane.domain.errors import DomainError
from control_plane.tasks.database import Database
from control_plane.tasks.location import Location, SqliteFile, StoreError
from control_plane.tasks.store import SqlTaskStore, StorePolicy


async def open_store(
    place: Location, policy: StorePolicy | None = None, committed: Callable[[float], object] | None = None
) -> SqlTaskStore:
    """The task store at a location. Raises StoreError if it cannot be used as it is, with what helps.

    `committed` is told of every transaction how many seconds it took.
    """
    database = await open_database(place)
    database.committed = committed
    try:
        return await SqlTaskStore.open(database, policy)
    except BaseException as error:
        await database.close()
        if isinstance(error, DomainError):
            raise StoreError(f"tasks.store {place.shown}: {error.message}") from None
        raise


async def open_database(place: Location, owner: str | None = None) -> Database:
    """Raises StoreError. The drivers are imported here: most programs need one, some none."""
    owner = owner or f"{socket.gethostname()[:40]}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
    if isinstance(place, SqliteFile):
        from control_plane.tasks.sqlite import open_sqlite

        return await open_sqlite(place, owner)
    missing = [name for name in ("asyncpg", "greenlet") if find_spec(name) is None]
    if missing:
        raise StoreError(f"tasks.store {place.shown} needs {' and '.join(missing)}: pip install 'modelyard[postgres]'")
    from control_plane.tasks.postgresql import open_postgresql

    return await open_postgresql(place, owner)
