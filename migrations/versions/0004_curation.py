"""Curation."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "curations",
        sa.Column("id", sa.Integer(), sa.Identity(always=False), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("spec", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("n_candidates", sa.Integer(), nullable=False),
        sa.Column("n_kept", sa.Integer(), nullable=False),
        sa.Column(
            "applied_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name="curations_pkey"),
        sa.UniqueConstraint("digest", name="curations_digest_key"),
    )
    op.create_table(
        "curation_stages",
        sa.Column("curation_id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("n_before", sa.Integer(), nullable=False),
        sa.Column("n_after", sa.Integer(), nullable=False),
        sa.CheckConstraint("n_after BETWEEN 0 AND n_before", name="curation_stages_funnel_check"),
        sa.ForeignKeyConstraint(
            ["curation_id"],
            ["curations.id"],
            name="curation_stages_curation_id_fkey",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name="curation_stages_run_id_fkey", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("curation_id", "run_id", "position", name="curation_stages_pkey"),
    )
    op.create_index("curation_stages_run_id_idx", "curation_stages", ["run_id"], unique=False)
    # Of each problem, by the newest verdict on each answer. Undecided ones are no samples.
    op.execute(
        """
        CREATE VIEW pass_rates AS
        SELECT trajectories.run_id, trajectories.problem_key,
               count(*) FILTER (WHERE newest.passed) AS n_passed,
               count(newest.passed) AS n_samples
        FROM trajectories CROSS JOIN LATERAL (
            SELECT passed FROM verdicts
            WHERE trajectory_id = trajectories.id AND check_name = 'answer'
            ORDER BY id DESC LIMIT 1
        ) AS newest
        GROUP BY trajectories.run_id, trajectories.problem_key
        """
    )


def downgrade() -> None:
    op.execute("DROP VIEW pass_rates")
    op.drop_table("curation_stages")
    op.drop_table("curations")
