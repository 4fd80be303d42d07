"""Alembic's entry: migrates over the connection, and in the transaction, of the caller."""

from __future__ import annotations

from alembic import context

from shared.store.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    compare_server_default=True,
)
with context.begin_transaction():
    context.run_migrations()
