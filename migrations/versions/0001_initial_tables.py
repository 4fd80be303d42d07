"""Initial tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

WRITTEN_ONCE = ("verdicts", "steps", "trajectories")  # children first


def upgrade() -> None:
    op.create_table(
        "problems",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("external_id", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=True),
        sa.Column("level", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("key", name="problems_pkey"),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer(), sa.Identity(always=False), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("config", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("code_version", sa.Text(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="running", nullable=False),
        sa.Column("n_items", sa.Integer(), server_default="0", nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('running', 'done', 'cancelled')", name="runs_state_check"),
        sa.PrimaryKeyConstraint("id", name="runs_pkey"),
        sa.UniqueConstraint("name", name="runs_name_key"),
    )
    op.create_table(
        "work_items",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("problem_key", sa.Text(), nullable=False),
        sa.Column("sample_index", sa.Integer(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="queued", nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("kills", sa.Integer(), server_default="0", nullable=False),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reject_check", sa.Text(), nullable=True),
        sa.Column("error_class", sa.Text(), nullable=True),
        sa.Column("error_text", sa.Text(), nullable=True),
        sa.Column("raw", sa.Text(), nullable=True),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "(state = 'leased') = (lease_owner IS NOT NULL AND lease_until IS NOT NULL)",
            name="work_items_lease_check",
        ),
        sa.CheckConstraint(
            "(state = 'rejected') = (reject_check IS NOT NULL)", name="work_items_rejected_check"
        ),
        sa.CheckConstraint(
            "state <> 'failed' OR error_class IS NOT NULL", name="work_items_failed_check"
        ),
        sa.CheckConstraint(
            "state IN ('queued', 'leased', 'vetted', 'rejected', 'failed', 'cancelled')",
            name="work_items_state_check",
        ),
        sa.ForeignKeyConstraint(
            ["problem_key"], ["problems.key"], name="work_items_problem_key_fkey"
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="work_items_run_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="work_items_pkey"),
        sa.UniqueConstraint("idempotency_key", name="work_items_idempotency_key_key"),
        sa.UniqueConstraint(
            "run_id", "problem_key", "sample_index", "fingerprint", name="work_items_run_id_key"
        ),
    )
    op.create_index(
        "work_items_lease_idx",
        "work_items",
        ["lease_until"],
        unique=False,
        postgresql_where=sa.text("state = 'leased'"),
    )
    op.create_index(
        "work_items_queue_idx",
        "work_items",
        ["run_id", "attempt", "id"],
        unique=False,
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index("work_items_run_state_idx", "work_items", ["run_id", "state"], unique=False)
    op.create_table(
        "model_usage",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("item_id", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("retries", sa.Integer(), nullable=False),
        sa.Column("duration", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["item_id"], ["work_items.id"], name="model_usage_item_id_fkey"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="model_usage_run_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="model_usage_pkey"),
    )
    op.create_index("model_usage_item_id_idx", "model_usage", ["item_id"], unique=False)
    op.create_index("model_usage_run_id_idx", "model_usage", ["run_id"], unique=False)
    op.create_table(
        "run_slots",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("token", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column(
            "alive_until",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="run_slots_run_id_fkey"),
        sa.PrimaryKeyConstraint("run_id", "slot", name="run_slots_pkey"),
    )
    op.create_table(
        "trajectories",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("item_id", sa.BigInteger(), nullable=False),
        sa.Column("problem_key", sa.Text(), nullable=False),
        sa.Column("content_hash", sa.Text(), nullable=False),
        sa.Column("end_reason", sa.Text(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("vetted", sa.Boolean(), nullable=False),
        sa.Column("thinking", sa.Boolean(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("n_steps", sa.Integer(), nullable=False),
        sa.Column("n_calls", sa.Integer(), nullable=False),
        sa.Column("n_failed_calls", sa.Integer(), nullable=False),
        sa.Column("n_corrections", sa.Integer(), nullable=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("duration", sa.Double(), nullable=False),
        sa.Column("sandbox_tier", sa.Text(), nullable=True),
        sa.Column("reasoner_model", sa.Text(), nullable=False),
        sa.Column("extractor_model", sa.Text(), nullable=True),
        sa.Column("code_version", sa.Text(), nullable=False),
        sa.Column("cleaned", sa.Boolean(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("body_bytes", sa.Integer(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(["item_id"], ["work_items.id"], name="trajectories_item_id_fkey"),
        sa.ForeignKeyConstraint(
            ["problem_key"], ["problems.key"], name="trajectories_problem_key_fkey"
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="trajectories_run_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="trajectories_pkey"),
        sa.UniqueConstraint("item_id", name="trajectories_item_id_key"),
    )
    op.create_index("trajectories_content_hash_idx", "trajectories", ["content_hash"], unique=False)
    op.create_index("trajectories_problem_key_idx", "trajectories", ["problem_key"], unique=False)
    op.create_index(
        "trajectories_run_id_vetted_idx", "trajectories", ["run_id", "vetted"], unique=False
    )
    op.create_table(
        "steps",
        sa.Column("trajectory_id", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("has_call", sa.Boolean(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("error_type", sa.Text(), nullable=True),
        sa.Column("duration", sa.Double(), nullable=True),
        sa.Column("cpu_time", sa.Double(), nullable=True),
        sa.Column("peak_memory", sa.BigInteger(), nullable=True),
        sa.Column("code_chars", sa.Integer(), nullable=True),
        sa.Column("imports", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["trajectory_id"], ["trajectories.id"], name="steps_trajectory_id_fkey"
        ),
        sa.PrimaryKeyConstraint("trajectory_id", "position", name="steps_pkey"),
    )
    op.create_index(
        "steps_error_type_idx",
        "steps",
        ["error_type"],
        unique=False,
        postgresql_where=sa.text("error_type <> ''"),
    )
    op.create_table(
        "verdicts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("trajectory_id", sa.BigInteger(), nullable=False),
        sa.Column("check_name", sa.Text(), nullable=False),
        sa.Column("passed", sa.Boolean(), nullable=True),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("evidence", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("duration", sa.Double(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["trajectory_id"], ["trajectories.id"], name="verdicts_trajectory_id_fkey"
        ),
        sa.PrimaryKeyConstraint("id", name="verdicts_pkey"),
    )
    op.create_index(
        "verdicts_trajectory_id_check_name_id_idx",
        "verdicts",
        ["trajectory_id", "check_name", "id"],
        unique=False,
    )

    # Bodies are compressed already: spare PostgreSQL the attempt.
    op.execute("ALTER TABLE trajectories ALTER COLUMN body SET STORAGE EXTERNAL")

    op.execute(
        """
        CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'rows of % are never changed or deleted', TG_TABLE_NAME;
        END $$
        """
    )
    for table in WRITTEN_ONCE:
        for event, level in (("UPDATE OR DELETE", "ROW"), ("TRUNCATE", "STATEMENT")):
            op.execute(
                f"CREATE TRIGGER {table}_{level.lower()}_written_once BEFORE {event} ON {table} "
                f"FOR EACH {level} EXECUTE FUNCTION refuse_change()"
            )
    op.execute(
        """
        CREATE VIEW current_verdicts AS
        SELECT DISTINCT ON (trajectory_id, check_name) *
        FROM verdicts ORDER BY trajectory_id, check_name, id DESC
        """
    )


def downgrade() -> None:
    op.execute("DROP VIEW current_verdicts")
    for table in (*WRITTEN_ONCE, "model_usage", "run_slots", "work_items", "runs", "problems"):
        op.drop_table(table)
    op.execute("DROP FUNCTION refuse_change()")
