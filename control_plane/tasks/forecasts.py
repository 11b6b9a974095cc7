"""The forecast in the database, so that a restart does not forget what hours and days are like.

Of several control planes over one database each counts what it dispatches itself; what is kept is that of the one that
wrote last, about its share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from sqlalchemy import Connection, select

from control_plane.domain.task import TaskType
from control_plane.predictors.forecast import Key, State
from control_plane.tasks import bulk, schema
from control_plane.tasks.database import Database
from control_plane.tasks.transaction import Transaction

_COLUMNS = ("task_type", "model", "data", "updated_at")


def kept(connection: Connection) -> list[tuple[Key, State]]:
    """What was last kept; what cannot be read is left out."""
    found = []
    for row in connection.execute(select(schema.forecasts).order_by(*schema.forecasts.primary_key)):
        try:
            found.append(((TaskType(row.task_type), str(row.model)), State(**json.loads(row.data))))
        except (ValueError, TypeError):
            continue
    return found


async def keep(database: Database, states: Iterable[tuple[Key, State]]) -> None:
    """Keep these over what is kept of the same keys. Raises DomainError STORE_UNAVAILABLE,
    STORE_FULL."""
    rows = [(int(kind), model, json.dumps(asdict(state)), database.now()) for (kind, model), state in states]

    def write(transaction: Transaction) -> None:
        bulk.upsert(transaction.connection, schema.forecasts, _COLUMNS, _COLUMNS[:2], sorted(rows))

    if rows:
        await database.write(write)
