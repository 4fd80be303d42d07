"""Alembic migrations, shipped in the wheel; run by `shared.store.migrate` (`tirgen db`)."""
