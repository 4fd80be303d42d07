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
BY_VALUE = (
    "run_id", "vetted", "reject_check", "end_reason",
    "n_calls", "n_failed_calls", "n_corrections", "n_tokens",
)  # fmt: skip

# What hangs on a run goes with it. What refers to it from elsewhere (snapshots) keeps it.
CASCADES = (
    ("work_items", "run_id", "runs"),
    ("model_usage", "run_id", "runs"),
    ("model_usage", "item_id", "work_items"),
    ("run_slots", "run_id", "runs"),
    ("trajectories", "run_id", "runs"),
    ("trajectories", "item_id", "work_items"),
    ("steps", "trajectory_id", "trajectories"),
    ("verdicts", "trajectory_id", "trajectories"),
)

REFUSE = "RAISE EXCEPTION 'rows of % are never changed or deleted', TG_TABLE_NAME;"

# Somebody who has named the run in tirgen.delete_run (shared.store.retention) may delete its
# trajectories, and their parts with them; nobody may change anything.
UNLESS_RUN_IS_DELETED = """
    IF TG_OP = 'DELETE' THEN
        IF TG_TABLE_NAME = 'trajectories' THEN
            IF OLD.run_id::text = current_setting('tirgen.delete_run', true) THEN
                RETURN OLD;
            END IF;
        ELSIF NOT EXISTS (SELECT FROM trajectories WHERE id = OLD.trajectory_id) THEN
            RETURN OLD;
        END IF;
    END IF;
"""


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
    op.create_index("trajectories_created_at_idx", "trajectories", ["created_at"])
    for name in BY_VALUE:
        op.create_index(f"trajectories_{name}_id_idx", "trajectories", [name, "id"])
    for name in ("external_id", "source", "subject", "level"):
        op.create_index(f"problems_{name}_idx", "problems", [name])
    op.create_index(
        "steps_outcome_idx", "steps", ["outcome"], postgresql_where=sa.text("outcome <> 'ok'")
    )
    _refuse_change(UNLESS_RUN_IS_DELETED)
    for reference in CASCADES:
        _refer(*reference, ondelete="CASCADE")


def downgrade() -> None:
    for reference in CASCADES:
        _refer(*reference)
    _refuse_change("")
    op.drop_index("steps_outcome_idx", "steps")
    for name in ("external_id", "source", "subject", "level"):
        op.drop_index(f"problems_{name}_idx", "problems")
    for name in BY_VALUE:
        op.drop_index(f"trajectories_{name}_id_idx", "trajectories")
    op.drop_index("trajectories_created_at_idx", "trajectories")
    op.drop_index("trajectories_run_id_vetted_id_idx", "trajectories")
    op.create_index("trajectories_run_id_vetted_idx", "trajectories", ["run_id", "vetted"])
    op.drop_index("trajectories_lists_idx", "trajectories")
    op.drop_constraint(op.f("trajectories_rejected_check"), "trajectories")
    for name in ("reject_check", *LISTS):
        op.drop_column("trajectories", name)


def _refuse_change(exceptions: str) -> None:
    op.execute(
        "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN {exceptions} {REFUSE} END $$"
    )


def _refer(table: str, column: str, to: str, ondelete: str | None = None) -> None:
    name = f"{table}_{column}_fkey"
    op.drop_constraint(name, table)
    op.create_foreign_key(name, table, to, [column], ["id"], ondelete=ondelete)
