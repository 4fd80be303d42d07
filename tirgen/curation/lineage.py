"""What a snapshot says of its origin: everything needed to trace it, nothing that should stay home.

Addresses of endpoints and hosts are left out: a snapshot may be published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from shared.store.models import RunRow, SnapshotKind
from shared.trajectory import Check

WITHHELD = "http://withheld.invalid/v1"  # passes for an address where a config is read again

# What a snapshot stands on: the trajectories, and the verdicts on them.
_TRAJECTORIES = {
    SnapshotKind.TRAJECTORIES: (
        "SELECT trajectory_id AS id FROM snapshot_rows WHERE snapshot_id = :snapshot"
    ),
    SnapshotKind.PROBLEMS: (
        "SELECT t.id FROM snapshot_rows r JOIN trajectories t USING (problem_key) "
        "WHERE r.snapshot_id = :snapshot AND t.run_id = ANY(:runs)"
    ),
}
_VERDICTS = {
    SnapshotKind.TRAJECTORIES: (
        "SELECT unnest(verdict_ids) AS id FROM snapshot_rows WHERE snapshot_id = :snapshot"
    ),
    SnapshotKind.PROBLEMS: (
        f"SELECT c.id FROM ({_TRAJECTORIES[SnapshotKind.PROBLEMS]}) used "
        "JOIN current_verdicts c ON c.trajectory_id = used.id "
        f"WHERE c.check_name = '{Check.ANSWER}'"
    ),
}

_Key = TypeVar("_Key")


def origin(
    session: Session, snapshot_id: int, kind: SnapshotKind, run_ids: Sequence[int]
) -> dict[str, Any]:
    """Runs, models, code versions, sandbox tiers and verifier versions behind the rows written."""
    names = {"snapshot": snapshot_id, "runs": list(run_ids)}
    columns = "t.run_id, t.reasoner_model, t.extractor_model, t.code_version, t.sandbox_tier"
    counted = session.execute(
        text(
            f"SELECT {columns}, count(*) FROM ({_TRAJECTORIES[kind]}) used "
            f"JOIN trajectories t ON t.id = used.id GROUP BY {columns}"
        ),
        names,
    ).all()
    verdicts = session.execute(
        text(
            "SELECT v.check_name AS check, v.version, count(*) FILTER (WHERE v.passed) AS passed, "
            "count(*) FILTER (WHERE NOT v.passed) AS failed, "
            "count(*) FILTER (WHERE v.passed IS NULL) AS undecided "
            f"FROM ({_VERDICTS[kind]}) used JOIN verdicts v ON v.id = used.id "
            "GROUP BY 1, 2 ORDER BY 1, 2"
        ),
        names,
    )
    by_run = _sums((row[0], row[-1]) for row in counted)
    runs = session.scalars(select(RunRow).where(RunRow.id.in_(run_ids)).order_by(RunRow.id))
    models = _sums(((row[1], row[2]), row[-1]) for row in counted)
    return {
        "runs": [_run(run, by_run.get(run.id, 0)) for run in runs],
        "models": [
            {"reasoner": reasoner, "extractor": extractor, "trajectories": n}
            for (reasoner, extractor), n in models.items()
        ],
        "code_versions": _sums((row[3], row[-1]) for row in counted),
        "sandbox_tiers": _sums((row[4] or "none", row[-1]) for row in counted),
        "verdicts": [dict(row) for row in verdicts.mappings()],
    }


def _run(run: RunRow, n: int) -> dict[str, Any]:
    return {
        "name": run.name, "kind": run.kind, "fingerprint": run.fingerprint,
        "code_version": run.code_version, "config": _published(run.config), "trajectories": n,
    }  # fmt: skip


def _published(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {k: WITHHELD if k == "base_url" else _published(v) for k, v in config.items()}
    return [_published(v) for v in config] if isinstance(config, list) else config


def _sums(pairs: Iterable[tuple[_Key, int]]) -> dict[_Key, int]:
    sums: dict[_Key, int] = {}
    for key, n in pairs:
        sums[key] = sums.get(key, 0) + n
    return dict(sorted(sums.items(), key=lambda pair: str(pair[0])))
