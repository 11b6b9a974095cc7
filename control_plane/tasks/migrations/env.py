"""How Alembic runs our migrations: on the connection that it is handed, see `control_plane.tasks.versions`.

A migration moves forward only and takes what a released program has written. On SQLite it changes tables with
`op.batch_alter_table`, which copies them.
"""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"], render_as_batch=True, transaction_per_migration=True
)
with context.begin_transaction():
    context.run_migrations()
