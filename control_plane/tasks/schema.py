"""The tables. Times are seconds since the epoch by the store's clock, enumerations their numbers.

`migrations` builds the same step by step; a test keeps the two equal.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    String,
    Table,
    Text,
    literal_column,
    text,
)

REVISION = "0005"
"""Of these tables: the newest migration."""

LATER = 0
"""State of a task that is queued for a time to come; the API shows it as QUEUED. The others are those of TaskState."""

metadata = MetaData()
_BigId = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts by itself only what it calls INTEGER


def _text(name: str, **more: Any) -> Column[str]:
    return Column(name, Text, nullable=False, **more)


tasks = Table(
    "tasks",
    metadata,
    _text("id", primary_key=True),
    _text("tenant"),
    Column("state", SmallInteger, nullable=False),
    Column("lane_id", BigInteger, nullable=False),
    Column("home_lane_id", BigInteger, nullable=False),  # before any failure
    Column("priority", SmallInteger, nullable=False),
    Column("task_type", SmallInteger, nullable=False),
    Column("group_name", Text),
    Column("idempotency_key", Text),
    Column("callback_url", Text),
    Column("epoch", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("lost", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("owner", Text),  # the dispatcher that has it in hand
    _text("server_id"),  # of the latest attempt, with the next two
    _text("model"),
    _text("provider"),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("finished_at", Double),
    Column("ready_at", Double),
    Column("deadline", Double),
    _text("failure_reason"),
    _text("failure_message"),
    sqlite_with_rowid=False,
)


def _where(condition: str) -> dict[str, Any]:
    # Written out, never bound: a planner uses a partial index only if it sees the very condition.
    return {"sqlite_where": text(condition), "info": {"where": condition}}


Index("tasks_key", tasks.c.tenant, tasks.c.idempotency_key, unique=True, **_where("idempotency_key IS NOT NULL"))
Index("tasks_startable", tasks.c.lane_id, tasks.c.id, **_where("state = 1"))
Index("tasks_later", tasks.c.ready_at, **_where("state = 0"))
Index("tasks_deadline", tasks.c.deadline, **_where("deadline IS NOT NULL AND state < 4"))
Index("tasks_owner", tasks.c.owner, **_where("owner IS NOT NULL"))
Index("tasks_state", tasks.c.tenant, tasks.c.state, tasks.c.id)
Index("tasks_group", tasks.c.tenant, tasks.c.group_name, tasks.c.id, **_where("group_name IS NOT NULL"))
Index("tasks_finished", tasks.c.finished_at, **_where("finished_at IS NOT NULL"))

STARTABLE = tasks.c.state == literal_column("1")
IS_LATER = tasks.c.state == literal_column("0")
NOT_TERMINAL = tasks.c.state < literal_column("4")

payloads = Table("payloads", metadata, _text("task_id", primary_key=True), Column("spec", LargeBinary, nullable=False))

# The primary key is the last line of defence: there is never a second result.
results = Table("results", metadata, _text("task_id", primary_key=True), Column("result", LargeBinary, nullable=False))

attempts = Table(
    "attempts",
    metadata,
    _text("task_id", primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    _text("server_id"),
    _text("instance_id"),
    _text("model"),
    _text("provider"),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("failed", Boolean, nullable=False),  # counts; one that was lost or given back does not
    _text("failure_reason"),
    _text("failure_message"),
    Column("cost_nano_usd", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

events = Table(
    "events",
    metadata,
    Column("id", _BigId, primary_key=True, autoincrement=False),
    _text("task_id"),
    _text("tenant"),
    Column("at", Double, nullable=False),
    Column("type", SmallInteger, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    _text("server_id"),
    _text("model"),
    _text("provider"),
    _text("reason"),
    _text("message"),
    _text("group_name"),
)
Index("events_task", events.c.task_id, events.c.id)

# One row. Whoever takes numbers from it holds it until his transaction ends, so what becomes visible later has
# greater numbers, on every replica.
counters = Table(
    "counters",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("events", BigInteger, nullable=False),
    Column("beliefs", BigInteger, nullable=False),
)

lanes = Table(
    "lanes",
    metadata,
    Column("id", _BigId, primary_key=True, autoincrement=True),
    _text("lane", unique=True),
    Column("used_at", Double, nullable=False),  # to within a few minutes
    sqlite_autoincrement=True,  # the number of a lane that was forgotten is never used again
)

dispatchers = Table(
    "dispatchers", metadata, _text("id", primary_key=True), Column("lease_until", Double, nullable=False)
)

deliveries = Table(
    "deliveries",
    metadata,
    _text("id", primary_key=True),
    _text("task_id"),
    _text("tenant"),
    Column("epoch", BigInteger, nullable=False),
    Column("task_state", SmallInteger, nullable=False),
    _text("url"),
    Column("state", SmallInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("due_at", Double, nullable=False),
    Column("finished_at", Double),
    _text("failure"),
)
Index("deliveries_due", deliveries.c.due_at, **_where("state = 1"))
Index("deliveries_task", deliveries.c.task_id)
Index("deliveries_state", deliveries.c.tenant, deliveries.c.state, deliveries.c.id)

DELIVERY_PENDING = 1

beliefs = Table(
    "beliefs",
    metadata,
    _text("tenant", primary_key=True),
    _text("key", primary_key=True),
    _text("value"),  # JSON
    Column("confidence", Double, nullable=False),
    _text("source"),
    Column("updated_at", Double, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("deleted", Boolean, nullable=False),
)
Index("beliefs_version", beliefs.c.version, unique=True)
Index("beliefs_deleted", beliefs.c.updated_at, **_where("deleted"))

statistics = Table(
    "statistics",
    metadata,
    _text("server_id", primary_key=True),
    _text("model", primary_key=True),
    _text("provider", primary_key=True),
    _text("fingerprint"),
    _text("data"),  # JSON
    Column("updated_at", Double, nullable=False),
)

knowledge = Table(
    "knowledge",
    metadata,
    _text("name", primary_key=True),
    _text("data"),  # JSON
    Column("updated_at", Double, nullable=False),
)


forecasts = Table(
    "forecasts",
    metadata,
    Column("task_type", SmallInteger, primary_key=True, autoincrement=False),
    _text("model", primary_key=True),
    _text("data"),  # JSON
    Column("updated_at", Double, nullable=False),
)


_usage_sums = (
    "requests",
    "failed",
    "estimated",
    "prompt_tokens",
    "cached_prompt_tokens",
    "completion_tokens",
    "nano_usd",
)

usage = Table(
    "usage",
    metadata,
    _text("tenant", primary_key=True),
    Column("hour", BigInteger, primary_key=True, autoincrement=False),  # its begin
    _text("model", primary_key=True),
    _text("provider", primary_key=True),
    _text("server_id", primary_key=True),
    Column("task_type", SmallInteger, primary_key=True, autoincrement=False),
    *(Column(name, BigInteger, nullable=False) for name in _usage_sums),
)
Index("usage_hour", usage.c.hour)


def _pot_key() -> list[Column[Any]]:
    return [
        _text("tenant", primary_key=True),
        _text("unit", primary_key=True),
        _text("period", primary_key=True),
        Column("starts", BigInteger, primary_key=True, autoincrement=False),
    ]


# What was spent of a budget in one window. Whoever changes a share of it holds its row.
budget_spending = Table("budget_spending", metadata, *_pot_key(), Column("spent", BigInteger, nullable=False))

budget_shares = Table(
    "budget_shares",
    metadata,
    *_pot_key(),
    _text("owner", primary_key=True),
    Column("share", BigInteger, nullable=False),
    Column("in_hand", BigInteger, nullable=False),  # of it, reserved when it was last heard of
    Column("charged", BigInteger, nullable=False),  # counted as spent since it was given up
)

# Control planes with shares, and the number of the latest exchange of each.
accountants = Table(
    "accountants",
    metadata,
    _text("id", primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("lease_until", Double, nullable=False),
)


# What agents have done, by kind of task; see control_plane.routing.experience.
agent_experience = Table(
    "agent_experience",
    metadata,
    _text("tenant", primary_key=True),
    _text("agent_id", primary_key=True),
    Column("task_type", SmallInteger, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),  # of the last outcome; the counts are those of then
    *(Column(name, Double, nullable=False) for name in ("tasks", "successes", "timed", "log_seconds")),
)
Index("agent_experience_at", agent_experience.c.at)


def for_postgresql() -> None:
    """Let partial indexes be partial in PostgreSQL too, before they are made there. Not from the beginning: to name the
    option loads its dialect, 2 MB that an embedded database does without."""
    for table in metadata.tables.values():
        for index in table.indexes:
            if "where" in index.info:
                index.dialect_options["postgresql"]["where"] = text(index.info["where"])


# What Alembic keeps its place in, read without it.
alembic_version = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
