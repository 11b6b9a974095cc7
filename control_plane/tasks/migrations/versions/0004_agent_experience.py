"""What is learned of agents.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "agent_experience",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("task_type", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("tasks", sa.Double(), nullable=False),
        sa.Column("successes", sa.Double(), nullable=False),
        sa.Column("timed", sa.Double(), nullable=False),
        sa.Column("log_seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "agent_id", "task_type"),
    )
    op.create_index("agent_experience_at", "agent_experience", ["at"], unique=False)
