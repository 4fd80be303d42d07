"""A snapshot is what was selected, says where it comes from, and never changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from shared.errors import ConfigError, DatabaseError, InputError
from shared.store import Database, snapshots, trajectories
from shared.store.models import ManifestRow, TrajectoryRow, VerdictRow
from shared.store.retention import delete_run
from shared.trajectory import Check, Verdict
from tests import frozen, stored
from tirgen import query
from tirgen.curation import freeze
from tirgen.curation.snapshots import Snapshots

SPLITS = {"train": 0.7, "valid": 0.3}
FILTERS = """
[[filters]]
filter = "length"
max_tokens = 40

[[filters]]
filter = "executed"
"""


@pytest.fixture(scope="module")
def shared(new_database: Callable[[], AbstractContextManager[str]]) -> Iterator[Snapshots]:
    with new_database() as url:
        db = Database(url)
        frozen.fill(db, 60)
        yield Snapshots(db)
        db.close()


@pytest.fixture
def made(shared: Snapshots) -> Iterator[Snapshots]:
    """Sixty trajectories that no test changes, and no snapshot yet."""
    yield shared
    for record in shared.list():
        shared.delete(record.name)


@pytest.fixture
def own(db: Database) -> Snapshots:
    """The same, for a test that changes what is there."""
    frozen.fill(db, 60)
    return Snapshots(db)


def rows(made: Snapshots, name: str) -> list[ManifestRow]:
    with made.db.session() as session:
        snapshot_id, _ = snapshots.find(session, name)
        chosen = select(ManifestRow).where(ManifestRow.snapshot_id == snapshot_id)
        return list(session.scalars(chosen.order_by(ManifestRow.position)))


# What is frozen


def test_holds_exactly_what_the_expression_selects(made: Snapshots) -> None:
    record = made.create("a", where="vetted and n_tokens >= 20", seed=1)
    with query.run(made.db, query.Query("vetted and n_tokens >= 20", ("id",))) as found:
        wanted = {row[0] for row in found}
    assert {row.trajectory_id for row in rows(made, "a")} == wanted
    assert 0 < record.n_rows == len(wanted) < 60
    assert [row.position for row in rows(made, "a")] == list(range(record.n_rows))


def test_same_seed_same_digest_another_seed_another_order(made: Snapshots) -> None:
    one = made.create("one", where="vetted", seed=1)
    again = made.create("again", where="vetted", seed=1)
    other = made.create("other", where="vetted", seed=2)
    assert one.digest == again.digest != other.digest
    assert made.diff("one", "again").is_empty
    assert made.diff("one", "other").is_empty  # the same rows, in another order
    ids = [row.trajectory_id for row in rows(made, "one")]
    assert ids != sorted(ids), "rows are shuffled"


def test_no_problem_is_in_two_splits_and_splits_are_ranges(made: Snapshots) -> None:
    record = made.create("a", where="vetted", seed=3, splits=SPLITS)
    found = rows(made, "a")
    by_split = {name: {r.problem_key for r in found if r.split == name} for name in SPLITS}
    assert by_split["train"]
    assert by_split["valid"]
    assert not by_split["train"] & by_split["valid"]
    n_train = record.splits["train"]
    assert [r.split for r in found] == ["train"] * n_train + ["valid"] * record.splits["valid"]


def test_a_problem_held_out_stays_held_out_in_later_snapshots(made: Snapshots) -> None:
    made.create("a", where="vetted", seed=3, splits=SPLITS)
    made.create("b", seed=3, splits=SPLITS)
    made.create("c", seed=4, splits=SPLITS)  # the control
    assert made.diff("a", "b").crossing == 0
    assert made.diff("a", "c").crossing > 0


def test_funnel_reconciles_to_the_row_and_filters_verdicts_are_pinned(
    made: Snapshots, tmp_path: Path
) -> None:
    chain = tmp_path / "chain.toml"
    chain.write_text(FILTERS)
    record = made.create("a", where="vetted", filters=str(chain), seed=1)
    funnel = record.lineage["funnel"]
    with made.db.session() as session:
        n_all = len(session.scalars(select(TrajectoryRow.id)).all())
        vetted = select(TrajectoryRow.id).where(TrajectoryRow.vetted)
        n_vetted = len(session.scalars(vetted).all())
        kept = session.scalars(vetted.where(TrajectoryRow.n_tokens <= 40)).all()
        passed = select(VerdictRow.trajectory_id).where(VerdictRow.passed)
        of_last = session.scalars(passed.where(VerdictRow.check_name == "filter/executed")).all()
        checks = {
            row.position: set(
                session.scalars(
                    select(VerdictRow.check_name).where(VerdictRow.id.in_(row.verdict_ids or []))
                )
            )
            for row in rows(made, "a")
        }
    counts = [(stage["stage"], stage["before"], stage["after"]) for stage in funnel]
    assert counts == [
        ("where", n_all, n_vetted), ("length", n_vetted, len(kept)),
        ("executed", len(kept), len(of_last)),
    ]  # fmt: skip
    assert 0 < len(of_last) < len(kept) < n_vetted
    assert {row.trajectory_id for row in rows(made, "a")} == set(of_last)
    wanted = {"executed", "answer", "filter/executed", "filter/length"}
    assert all(found == wanted for found in checks.values())
    assert record.lineage["filters"]["filters"][0]["parameters"]["max_tokens"] == 40


def test_verdicts_of_other_snapshots_filters_are_not_used(made: Snapshots, tmp_path: Path) -> None:
    before = made.create("before", where="vetted")
    chain = tmp_path / "chain.toml"
    chain.write_text(FILTERS)
    made.create("filtered", where="vetted", filters=str(chain))
    assert made.create("after", where="vetted").digest == before.digest


def test_a_later_verdict_makes_another_digest_and_leaves_the_old_snapshot(own: Snapshots) -> None:
    before = own.create("before", where="vetted")
    first = rows(own, "before")[0].trajectory_id
    assert first is not None
    later = Verdict(Check.ANSWER, False, "2", "different after all")
    with own.db.begin() as session:
        trajectories.add_verdicts(session, [(first, later)])
    after = own.create("after", where="vetted")
    assert after.digest != before.digest
    assert own.diff("before", "after").rejudged == 1
    assert own.verify("before").is_sound


def test_lineage_names_what_made_the_rows_and_keeps_addresses_home(made: Snapshots) -> None:
    lineage = made.create("a", where="vetted", seed=5).lineage
    [run] = lineage["runs"]
    assert (run["name"], run["fingerprint"], run["trajectories"]) == ("many", "f", 48)
    assert run["config"]["reasoner"]["temperature"] is not None
    assert "127.0.0.1" not in str(lineage)
    assert lineage["models"] == [{"reasoner": "nano", "extractor": None, "trajectories": 48}]
    assert lineage["code_versions"] == {"abc": 48}
    assert lineage["sandbox_tiers"] == {"B": 48}
    assert lineage["verdicts"] == [
        {"check": "answer", "version": "1/g1", "passed": 48, "failed": 0, "undecided": 0},
        {"check": "executed", "version": "1", "passed": 48, "failed": 0, "undecided": 0},
    ]
    assert (lineage["where"], lineage["seed"], lineage["filters"]) == ("vetted", 5, None)


def test_problems_come_with_the_rate_over_all_their_answers(made: Snapshots) -> None:
    """Also over those that the expression leaves out: a rate over chosen ones says nothing."""
    record = made.create("p", where="not vetted", kind="problems", seed=1)
    entries = list(made.open("p").problems())
    assert len(entries) == record.n_rows == 12
    assert {(entry.n_passed, entry.n_samples) for entry in entries} == {(1, 2)}
    assert entries[0].pass_rate == 0.5
    stages = [(s["before"], s["after"]) for s in record.lineage["funnel"]]
    assert stages == [(60, 12), (12, 12)]
    every = made.create("every", kind="problems")
    assert every.n_rows == 30
    rates = {entry.pass_rate for entry in made.open("every").problems()}
    assert rates == {0.5, 1.0}


# What never changes


def test_no_statement_changes_a_snapshot(made: Snapshots) -> None:
    record = made.create("a", where="vetted")
    columns = {"snapshots": "n_rows", "snapshot_rows": "split", "snapshot_runs": "run_id"}
    changes = ("UPDATE {} SET {} = {}", "DELETE FROM {}", "TRUNCATE {} CASCADE")
    for table, column in columns.items():
        for change in changes:
            statement = text(change.format(table, column, column))
            with pytest.raises(DBAPIError, match="never changed"), made.db.begin() as session:
                session.execute(statement)
    assert made.show("a") == record
    assert made.verify("a").is_sound


def test_no_row_is_added_behind_the_seal(made: Snapshots) -> None:
    made.create("a", where="vetted")
    late = (
        "INSERT INTO snapshot_rows (snapshot_id, position, split, problem_key, n_passed, n_samples)"
        " SELECT snapshot_id, 1000, split, problem_key, 0, 0 FROM snapshot_rows LIMIT 1"
    )
    with pytest.raises(DBAPIError, match="never changed"), made.db.begin() as session:
        session.execute(text(late))


def test_rows_without_a_record_cannot_be_left_behind(made: Snapshots) -> None:
    orphan = (
        "INSERT INTO snapshot_rows (snapshot_id, position, split, problem_key, n_passed, n_samples)"
        " SELECT 1000, 0, 'train', key, 0, 0 FROM problems LIMIT 1"
    )
    with pytest.raises(DBAPIError, match="foreign key"), made.db.begin() as session:
        session.execute(text(orphan))


def test_delete_takes_the_whole_and_nothing_else(made: Snapshots) -> None:
    made.create("a", where="vetted")
    kept = made.create("b", where="vetted")
    made.delete("a")
    assert [record.name for record in made.list()] == ["b"]
    assert made.verify("b").is_sound
    with made.db.session() as session:
        left = [
            session.scalar(text(f"SELECT count(*) FROM {t}"))
            for t in ("snapshot_rows", "trajectories")
        ]
    assert left == [kept.n_rows, 60]
    with pytest.raises(InputError, match="no snapshot named 'a'"):
        made.delete("a")


def test_deleting_takes_the_name_and_never_a_part(made: Snapshots) -> None:
    made.create("a", where="vetted")
    made.create("b", where="vetted")
    named = "SELECT set_config('tirgen.delete_snapshot', 'a', true);"
    for statement in ("DELETE FROM snapshots", "DELETE FROM snapshot_rows"):
        with pytest.raises(DBAPIError, match="never changed"), made.db.begin() as session:
            session.execute(text(named + statement))


def test_a_run_knows_the_snapshots_that_hold_it(own: Snapshots) -> None:
    stored.fill(own.db)
    own.create("b", where='run == "many"')
    own.create("a", where='run == "many"', kind="problems")
    own.create("c", where='run == "one" and vetted')
    with own.db.session() as session:
        assert snapshots.of_run(session, "many") == ["a", "b"]
        assert snapshots.of_run(session, "none") == []
    with pytest.raises(DBAPIError, match="foreign key"), own.db.begin() as session:
        session.execute(text("DELETE FROM runs WHERE name = 'many'"))


# What is refused


def test_a_name_is_taken_once_even_by_two_at_once(
    made: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = snapshots.reserve

    def overtaken(session: object) -> int:
        monkeypatch.setattr(snapshots, "reserve", reserve)
        made.create("a", where="vetted", seed=1)  # wholly, while the other one is under way
        return reserve(session)  # type: ignore[arg-type]

    monkeypatch.setattr(snapshots, "reserve", overtaken)
    with pytest.raises(InputError, match="'a' already"):
        made.create("a", where="vetted", seed=2)
    with pytest.raises(InputError, match="'a' already"):
        made.create("a", where="vetted", seed=2)
    assert made.show("a").lineage["seed"] == 1
    assert made.verify("a").is_sound


def test_nothing_is_kept_of_a_creation_that_fails(
    made: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise DatabaseError("the power is gone")

    monkeypatch.setattr(snapshots, "seal", fails)
    with pytest.raises(DatabaseError, match="power"):
        made.create("a", where="vetted")
    with made.db.session() as session:
        assert session.scalar(text("SELECT count(*) FROM snapshot_rows")) == 0


def test_what_cannot_be_frozen_is_refused_before_anything_is_written(made: Snapshots) -> None:
    with pytest.raises(InputError, match="nothing is left to freeze: 60 -> 0"):
        made.create("a", where="n_calls > 100")
    with pytest.raises(InputError, match="split valid would be empty"):
        made.create(
            "a", where="n_tokens == 10 and n_bytes > 0", splits={"train": 1 - 1e-9, "valid": 1e-9}
        )
    for name in ("../a", "-a", "a b", "", "a" * 101):
        with pytest.raises(ConfigError, match="cannot be the name"):
            made.create(name)
    with pytest.raises(ConfigError, match="vettet"):
        made.create("a", where="vettet")
    with pytest.raises(ConfigError):
        made.create("a", filters="no such chain")
    assert made.list() == []


def test_a_damaged_trajectory_is_not_frozen(own: Snapshots) -> None:
    forged = trajectories.encode(stored.trajectory(7, "forged")).body
    for body in (forged, forged[:-1], b""):
        frozen.alter(own.db, "UPDATE trajectories SET body = :body WHERE id = 3", body=body)
        with pytest.raises(DatabaseError, match="content hash"):
            own.create("a")


def test_a_run_that_is_deleted_meanwhile_is_not_frozen(
    own: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = freeze._check_funnel

    def overtaken(*arguments: object) -> None:
        check(*arguments)  # type: ignore[arg-type]
        delete_run(own.db, "many")

    monkeypatch.setattr(freeze, "_check_funnel", overtaken)
    with pytest.raises(DatabaseError, match="deleted while its trajectories"):
        own.create("a")
    monkeypatch.undo()
    assert own.list() == []
    frozen.fill(own.db, 4, run="other")
    own.create("a")
    with pytest.raises(InputError, match="kept by snapshots: a"):
        delete_run(own.db, "other")


def test_a_funnel_that_does_not_add_up_is_refused(
    made: Snapshots, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chain = tmp_path / "chain.toml"
    chain.write_text(FILTERS)
    apply = freeze.chains.apply

    def loses_one(*arguments: object, seed: int) -> object:
        curated = apply(*arguments, seed=seed)  # type: ignore[arg-type]
        curated.kept.pop()
        return curated

    monkeypatch.setattr(freeze.chains, "apply", loses_one)
    with pytest.raises(DatabaseError, match="does not reconcile"):
        made.create("a", where="vetted", filters=str(chain))
