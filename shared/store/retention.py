"""Deleting a run with all that hangs on it: the only way in which a trajectory ever goes.

Foreign keys decide what that is: tables that belong to a run cascade, snapshots do not.
Trajectories and their parts are written once; their triggers let go only of the run named here.
"""

from __future__ import annotations

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from shared.errors import InputError
from shared.store import snapshots
from shared.store.database import Database
from shared.store.models import RunRow, RunState, TrajectoryRow, VerdictRow, WorkItemRow
from shared.store.queries import find_run


def extent(db: Database, name: str) -> dict[str, int]:
    """What `delete_run` would delete, or the InputError that it would raise."""
    with db.session() as session:
        run = _deletable(session, name)
        items = select(func.count()).where(WorkItemRow.run_id == run.id)
        trajectories = select(func.count()).where(TrajectoryRow.run_id == run.id)
        of_run = VerdictRow.trajectory_id == TrajectoryRow.id
        verdicts = select(func.count()).where(of_run, TrajectoryRow.run_id == run.id)
        counts = {"items": items, "trajectories": trajectories, "verdicts": verdicts}
        return {what: int(session.scalar(n) or 0) for what, n in counts.items()}


def delete_run(db: Database, name: str) -> None:
    """Delete the run, its items, their trajectories, steps, verdicts and costs; problems stay.

    One transaction. Raises InputError if there is no such run, if it is running, or if a snapshot
    refers to it, with the names of those that do.
    """
    with db.begin() as session:
        # Whoever freezes a snapshot of the run now waits for us, and then finds nothing of it.
        session.execute(select(RunRow.id).where(RunRow.name == name).with_for_update())
        run = _deletable(session, name)
        session.execute(select(func.set_config("tirgen.delete_run", str(run.id), True)))
        session.execute(delete(RunRow).where(RunRow.id == run.id))


def _deletable(session: Session, name: str) -> RunRow:
    run = find_run(session, name)
    if run.state == RunState.RUNNING:
        what, remedy = f"run {name!r} is running", f"end it first: tirgen cancel {name}"
        raise InputError(what, where=f"run {name}", remedy=remedy)
    kept_by = snapshots.of_run(session, name)
    if kept_by:
        raise InputError(
            f"run {name!r} is kept by snapshots: {', '.join(kept_by)}",
            where=f"run {name}",
            remedy="delete them first (tirgen snapshot delete NAME), or keep the run",
        )
    return run
