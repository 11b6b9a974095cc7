"""What was learned of agents, in the database."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, select

from control_plane.domain.agent import AgentId, LearnedOfAgent, Tally
from control_plane.tasks import bulk, schema
from control_plane.tasks.database import Database
from control_plane.tasks.transaction import Transaction

_TABLE = schema.agent_experience
_COLUMNS = tuple(column.name for column in _TABLE.columns)
_KEY = _COLUMNS[:3]


class AgentStore:
    """Keeps what was learned of agents. Every method raises DomainError STORE_UNAVAILABLE when the database does not
    answer, and a writing one STORE_FULL when its disk is full."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def learned(self, limit: int) -> list[LearnedOfAgent]:
        """What is kept, the oldest first; at most so many rows, the newest."""

        def read(connection: Connection) -> list[LearnedOfAgent]:
            query = select(_TABLE).order_by(_TABLE.c.at.desc()).limit(limit)
            return [
                LearnedOfAgent(
                    row.tenant,
                    AgentId(row.agent_id),
                    row.task_type,
                    row.at,
                    Tally(row.tasks, row.successes, row.timed, row.log_seconds),
                )
                for row in connection.execute(query)
            ][::-1]

        return await self._database.read(read)

    async def keep(self, learned: Sequence[LearnedOfAgent], before: float, limit: int) -> None:
        """Keep this over what is kept of the same; forget what has seen no outcome since `before` (seconds since
        1970), and all but the newest `limit` rows."""
        rows = sorted(
            (one.tenant, one.agent_id, one.task_type, one.at, t.tasks, t.successes, t.timed, t.log_seconds)
            for one in learned
            for t in [one.tally]
        )

        def write(transaction: Transaction) -> None:
            connection = transaction.connection
            bulk.upsert(connection, _TABLE, _COLUMNS, _KEY, rows)
            newest = select(_TABLE.c.at).order_by(_TABLE.c.at.desc()).offset(limit - 1).limit(1).scalar_subquery()
            connection.execute(delete(_TABLE).where((_TABLE.c.at < before) | (_TABLE.c.at < newest)))

        if rows:
            await self._database.write(write)
