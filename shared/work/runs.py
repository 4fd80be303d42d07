"""A run's beginning: its row, its items and its slots, in one transaction of the caller."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Mapping
from typing import Any

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.errors import InputError
from shared.store.models import RunRow
from shared.trajectory import clean


def create_run(
    session: Session,
    *,
    name: str,
    kind: str,
    config: Mapping[str, Any],
    fingerprint: str,
    code_version: str,
) -> int:
    """Insert the run and return its id. Raises InputError if the name is taken."""
    row = {
        "name": name,
        "kind": kind,
        "config": clean(config)[0],
        "fingerprint": fingerprint,
        "code_version": code_version,
        "created_by": getpass.getuser(),
        "host": socket.gethostname(),
    }
    statement = insert(RunRow).values(row).on_conflict_do_nothing().returning(RunRow.id)
    run_id = session.execute(statement).scalar_one_or_none()
    if run_id is None:
        remedy = f"resume it with `tirgen resume {name}`, or choose another name"
        raise InputError(f"there is a run named {name!r} already", remedy=remedy)
    return run_id
