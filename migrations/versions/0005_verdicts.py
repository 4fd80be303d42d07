"""What the samples of a problem agree on. (Verdicts have had their versions from the start.)"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "consensus",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("problem_key", sa.Text(), nullable=False),
        sa.Column("n_samples", sa.Integer(), nullable=False),
        sa.Column("n_answers", sa.Integer(), nullable=False),
        sa.Column("votes", sa.Integer(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("share", sa.Double(), nullable=True),
        sa.Column("tied", sa.Boolean(), nullable=False),
        sa.Column("disagrees", sa.Boolean(), nullable=True),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["problem_key"], ["problems.key"], name="consensus_problem_key_fkey"
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name="consensus_run_id_fkey", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "problem_key", name="consensus_pkey"),
    )
    op.create_index(
        "consensus_disagrees_idx",
        "consensus",
        ["run_id"],
        unique=False,
        postgresql_where=sa.text("disagrees"),
    )


def downgrade() -> None:
    op.drop_table("consensus")
