"""Facts that are filtered by."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

LISTS = ("imports", "outcomes", "error_types")
# With the id, in which pages are ordered: a page of equal values needs no sort.
BY_VALUE = ("n_calls", "n_failed_calls", "n_corrections", "n_tokens", "end_reason", "reject_check")


def upgrade() -> None:
    for name in LISTS:
        op.add_column("trajectories", sa.Column(name, postgresql.ARRAY(sa.Text()), nullable=False))
    op.add_column("trajectories", sa.Column("reject_check", sa.Text(), nullable=True))
    op.create_check_constraint(
        op.f("trajectories_rejected_check"), "trajectories", "vetted = (reject_check IS NULL)"
    )
    op.create_index("trajectories_lists_idx", "trajectories", LISTS, postgresql_using="gin")
    op.drop_index("trajectories_run_id_vetted_idx", "trajectories")
    op.create_index("trajectories_run_id_vetted_id_idx", "trajectories", ["run_id", "vetted", "id"])
    op.create_index("trajectories_run_id_id_idx", "trajectories", ["run_id", "id"])
    op.create_index("trajectories_created_at_idx", "trajectories", ["created_at"])
    for name in BY_VALUE:
        op.create_index(f"trajectories_{name}_id_idx", "trajectories", [name, "id"])
    for name in ("external_id", "source", "subject", "level"):
        op.create_index(f"problems_{name}_idx", "problems", [name])
    op.create_index(
        "steps_outcome_idx", "steps", ["outcome"], postgresql_where=sa.text("outcome <> 'ok'")
    )


def downgrade() -> None:
    op.drop_index("steps_outcome_idx", "steps")
    for name in ("external_id", "source", "subject", "level"):
        op.drop_index(f"problems_{name}_idx", "problems")
    for name in BY_VALUE:
        op.drop_index(f"trajectories_{name}_id_idx", "trajectories")
    op.drop_index("trajectories_created_at_idx", "trajectories")
    op.drop_index("trajectories_run_id_id_idx", "trajectories")
    op.drop_index("trajectories_run_id_vetted_id_idx", "trajectories")
    op.create_index("trajectories_run_id_vetted_idx", "trajectories", ["run_id", "vetted"])
    op.drop_index("trajectories_lists_idx", "trajectories")
    op.drop_constraint(op.f("trajectories_rejected_check"), "trajectories")
    for name in ("reject_check", *LISTS):
        op.drop_column("trajectories", name)
