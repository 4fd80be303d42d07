"""Why a run stopped, and what workers see of the endpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("stop_reason", sa.Text(), nullable=True))
    op.create_table(
        "endpoint_status",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("roles", sa.Text(), nullable=False),
        sa.Column("base_url", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("max_in_flight", sa.Integer(), nullable=False),
        sa.Column("in_flight", sa.Integer(), nullable=False),
        sa.Column("breaker", sa.Text(), nullable=False),
        sa.Column("requests_per_second", sa.Double(), nullable=False),
        sa.Column("tokens_per_second", sa.Double(), nullable=False),
        sa.Column("latency", sa.Double(), nullable=False),
        sa.Column(
            "seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name="endpoint_status_run_id_fkey", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("owner", "roles", "base_url", name="endpoint_status_pkey"),
    )
    op.create_index("endpoint_status_run_id_idx", "endpoint_status", ["run_id"])


def downgrade() -> None:
    op.drop_table("endpoint_status")
    op.drop_column("runs", "stop_reason")
