"""Open the task store that a setting names."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping

from control_plane.tasks.database import Database
from control_plane.tasks.location import Location, SqliteFile, located
from control_plane.tasks.store import SqlTaskStore, StorePolicy


async def open_store(url: str, policy: StorePolicy, env: Mapping[str, str]) -> SqlTaskStore:
    """The task store of the setting `tasks.store`. Raises StoreError if it cannot be used as it is, with what helps."""
    database = await open_database(located(url, env))
    try:
        return await SqlTaskStore.open(database, policy)
    except BaseException:
        await database.close()
        raise


async def open_database(place: Location, owner: str | None = None) -> Database:
    """Raises StoreError. The drivers are imported here: most programs need one, some none."""
    owner = owner or f"{socket.gethostname()[:40]}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
    if isinstance(place, SqliteFile):
        from control_plane.tasks.sqlite import open_sqlite

        return await open_sqlite(place, owner)
    from control_plane.tasks.postgresql import open_postgresql

    return await open_postgresql(place, owner)
