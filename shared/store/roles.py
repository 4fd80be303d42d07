"""Who may do what: three roles, for a server that several people and programs share.

A role is a group: people and programs get logins of their own and become members. Roles belong to
the whole server, rights to one database. Migrations, deletion and roles are the owner's.
"""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import Session

from shared.errors import DatabaseError
from shared.store.database import Database

WRITER = "tirgen_writer"
READER = "tirgen_reader"
TRAINER = "tirgen_trainer"

ROLES = {
    WRITER: "workers, and people who start runs: reads all, adds rows, deletes no data",
    READER: "queries: reads all, writes nothing",
    TRAINER: "training jobs: reads snapshots and what they name, writes its jobs and their metrics",
}
TRAINER_READS = (
    "alembic_version", "snapshots", "snapshot_rows", "snapshot_runs", "trajectories", "problems",
    "verdicts", "current_verdicts", "runs",
)  # fmt: skip
TRAINER_WRITES = ("jobs", "job_metrics", "job_checkpoints")


def create(db: Database) -> None:
    """Make the roles and give them their rights in this database; doing it again does no harm.

    The writer's and reader's rights hold for later tables too, if the same login makes them.
    Raises DatabaseError without the right to make roles.
    """
    with db.begin() as session:
        may = "SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user"
        if not session.scalar(text(may)):
            remedy = "connect as a superuser, or as the database's owner with CREATEROLE"
            raise DatabaseError("this login may not make roles", where=db.location, remedy=remedy)
        for role in ROLES:
            there = text("SELECT true FROM pg_roles WHERE rolname = :role")
            if not session.scalar(there, {"role": role}):
                session.execute(text(f"CREATE ROLE {role} NOLOGIN"))
        for statement in _grants("public", f"{READER}, {WRITER}"):
            session.execute(text(statement))
        session.execute(text(f"GRANT SELECT ON {', '.join(TRAINER_READS)} TO {TRAINER}"))
        written = ", ".join(TRAINER_WRITES)
        session.execute(text(f"GRANT SELECT, INSERT, UPDATE ON {written} TO {TRAINER}"))
        # A job that resumes makes anew the steps it goes back to.
        undone = "job_metrics, job_checkpoints"
        session.execute(text(f"GRANT DELETE ON {undone} TO {TRAINER}, {WRITER}"))
        if _has_schema(session, "pgmq"):
            for statement in _broker_grants():
                session.execute(text(statement))


def _grants(schema: str, readers: str) -> list[str]:
    inside = f"ALTER DEFAULT PRIVILEGES IN SCHEMA {schema}"
    return [
        f"GRANT USAGE ON SCHEMA {schema} TO {readers}, {TRAINER}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {readers}",
        f"GRANT INSERT, UPDATE ON ALL TABLES IN SCHEMA {schema} TO {WRITER}",
        f"GRANT DELETE ON run_slots, endpoint_status TO {WRITER}",
        f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO {WRITER}",
        f"REVOKE INSERT, UPDATE ON alembic_version FROM {WRITER}",
        f"{inside} GRANT SELECT ON TABLES TO {readers}",
        f"{inside} GRANT INSERT, UPDATE ON TABLES TO {WRITER}",
        f"{inside} GRANT USAGE ON SEQUENCES TO {WRITER}",
    ]


def _broker_grants() -> list[str]:
    """Queues are tables that come and go with their messages."""
    inside = "ALTER DEFAULT PRIVILEGES IN SCHEMA pgmq"
    return [
        f"GRANT USAGE, CREATE ON SCHEMA pgmq TO {WRITER}",
        f"GRANT ALL ON ALL TABLES IN SCHEMA pgmq TO {WRITER}",
        f"GRANT ALL ON ALL SEQUENCES IN SCHEMA pgmq TO {WRITER}",
        f"{inside} GRANT ALL ON TABLES TO {WRITER}",
        f"{inside} GRANT ALL ON SEQUENCES TO {WRITER}",
    ]


def _has_schema(session: Session, name: str) -> bool:
    return session.scalar(text("SELECT to_regnamespace(:name)"), {"name": name}) is not None
