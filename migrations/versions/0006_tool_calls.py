"""What is recorded of a tool call: how it was confined, whether it was replayed, what was cut."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("sandbox_tier", sa.Text(), nullable=True))
    op.add_column("steps", sa.Column("replayed", sa.Boolean(), nullable=True))
    op.add_column("steps", sa.Column("bytes_cut", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    for column in ("sandbox_tier", "replayed", "bytes_cut"):
        op.drop_column("steps", column)
