"""Snapshots."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

PARTS = ("snapshot_rows", "snapshot_runs")


def upgrade() -> None:
    op.create_table(
        "snapshots",
        sa.Column("id", sa.Integer(), sa.Identity(always=False), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("n_rows", sa.Integer(), nullable=False),
        sa.Column("splits", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("lineage", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("checksum", sa.Text(), nullable=False),
        sa.CheckConstraint("kind IN ('trajectories', 'problems')", name="snapshots_kind_check"),
        sa.PrimaryKeyConstraint("id", name="snapshots_pkey"),
        sa.UniqueConstraint("name", name="snapshots_name_key"),
    )
    op.create_table(
        "snapshot_rows",
        sa.Column("snapshot_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("problem_key", sa.Text(), nullable=False),
        sa.Column("trajectory_id", sa.BigInteger(), nullable=True),
        sa.Column("content_hash", sa.Text(), nullable=True),
        sa.Column("body_hash", sa.Text(), nullable=True),
        sa.Column("verdict_ids", postgresql.ARRAY(sa.BigInteger()), nullable=True),
        sa.Column("verdicts_hash", sa.Text(), nullable=True),
        sa.Column("n_passed", sa.Integer(), nullable=True),
        sa.Column("n_samples", sa.Integer(), nullable=True),
        sa.CheckConstraint(
            "num_nulls(trajectory_id, content_hash, body_hash, verdict_ids, verdicts_hash) "
            "= CASE WHEN n_samples IS NULL THEN 0 ELSE 5 END",
            name="snapshot_rows_trajectory_check",
        ),
        sa.CheckConstraint(
            "(n_passed IS NULL) = (n_samples IS NULL) AND n_passed BETWEEN 0 AND n_samples",
            name="snapshot_rows_difficulty_check",
        ),
        sa.ForeignKeyConstraint(
            ["problem_key"], ["problems.key"], name="snapshot_rows_problem_key_fkey"
        ),
        sa.ForeignKeyConstraint(
            ["snapshot_id"],
            ["snapshots.id"],
            name="snapshot_rows_snapshot_id_fkey",
            ondelete="CASCADE",
            initially="DEFERRED",
            deferrable=True,
        ),
        sa.ForeignKeyConstraint(
            ["trajectory_id"], ["trajectories.id"], name="snapshot_rows_trajectory_id_fkey"
        ),
        sa.PrimaryKeyConstraint("snapshot_id", "position", name="snapshot_rows_pkey"),
    )
    op.create_index(
        "snapshot_rows_trajectory_id_idx", "snapshot_rows", ["trajectory_id"], unique=False
    )
    op.create_table(
        "snapshot_runs",
        sa.Column("snapshot_id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="snapshot_runs_run_id_fkey"),
        sa.ForeignKeyConstraint(
            ["snapshot_id"],
            ["snapshots.id"],
            name="snapshot_runs_snapshot_id_fkey",
            ondelete="CASCADE",
            initially="DEFERRED",
            deferrable=True,
        ),
        sa.PrimaryKeyConstraint("snapshot_id", "run_id", name="snapshot_runs_pkey"),
    )
    op.create_index("snapshot_runs_run_id_idx", "snapshot_runs", ["run_id"], unique=False)

    # Nothing of a snapshot is ever updated. It is deleted as a whole or not at all: by someone who
    # has named it in tirgen.delete_snapshot (shared.store.snapshots.delete), and its parts with it.
    op.execute(
        """
        CREATE FUNCTION keep_snapshot() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'DELETE' THEN
                IF OLD.name = current_setting('tirgen.delete_snapshot', true) THEN
                    RETURN OLD;
                END IF;
            END IF;
            RAISE EXCEPTION 'snapshots are never changed'
                USING HINT = 'tirgen snapshot delete NAME removes a whole one';
        END $$
        """
    )
    op.execute(
        """
        CREATE FUNCTION keep_snapshot_part() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'DELETE' THEN
                IF NOT EXISTS (SELECT FROM snapshots WHERE id = OLD.snapshot_id) THEN
                    RETURN OLD;
                END IF;
            END IF;
            RAISE EXCEPTION 'snapshots are never changed'
                USING HINT = 'tirgen snapshot delete NAME removes a whole one';
        END $$
        """
    )
    # The row in `snapshots` is written last, and is the seal: nothing can be added behind it.
    op.execute(
        """
        CREATE FUNCTION refuse_late_rows() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF EXISTS (SELECT FROM snapshots WHERE id IN (SELECT snapshot_id FROM added)) THEN
                RAISE EXCEPTION 'snapshots are never changed'
                    USING HINT = 'create another one';
            END IF;
            RETURN NULL;
        END $$
        """
    )
    for table in ("snapshots", *PARTS):
        function = "keep_snapshot" if table == "snapshots" else "keep_snapshot_part"
        for event, level in (("UPDATE OR DELETE", "ROW"), ("TRUNCATE", "STATEMENT")):
            op.execute(
                f"CREATE TRIGGER {table}_{level.lower()}_kept BEFORE {event} ON {table} "
                f"FOR EACH {level} EXECUTE FUNCTION {function}()"
            )
    for table in PARTS:
        op.execute(
            f"CREATE TRIGGER {table}_sealed AFTER INSERT ON {table} "
            "REFERENCING NEW TABLE AS added "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_late_rows()"
        )


def downgrade() -> None:
    for table in (*PARTS, "snapshots"):
        op.drop_table(table)
    for function in ("keep_snapshot", "keep_snapshot_part", "refuse_late_rows"):
        op.execute(f"DROP FUNCTION {function}()")
