"""The trajectory database: PostgreSQL, its tables, and the ways in and out of it."""

from shared.store.database import Database, libpq_conninfo, resolve_url, tirgen_home
from shared.store.embedded import EmbeddedPostgres, ServerStatus
from shared.store.models import ItemState, RunState
from shared.store.snapshot_reader import Snapshot
from shared.store.snapshot_rows import ProblemEntry, TrajectoryEntry
from shared.store.trajectories import Completed, RoleUsage

__all__ = [
    "Completed",
    "Database",
    "EmbeddedPostgres",
    "ItemState",
    "ProblemEntry",
    "RoleUsage",
    "RunState",
    "ServerStatus",
    "Snapshot",
    "TrajectoryEntry",
    "libpq_conninfo",
    "resolve_url",
    "tirgen_home",
]
