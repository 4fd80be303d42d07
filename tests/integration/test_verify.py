"""tirgen verify: old trajectories, new verdicts, and a confusion that adds up with the rows."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import typer
from sqlalchemy import insert, select, text
from typer.testing import CliRunner, Result

from shared.errors import ConfigError, InputError
from shared.store import Completed, Database, snapshots, trajectories
from shared.store.models import ManifestRow, SnapshotKind, TrajectoryRow, WorkItemRow
from shared.store.snapshots import Record
from shared.trajectory import Check, End, Problem, Step, ToolCall, Trajectory, Verdict
from tests import stored
from tirgen import reverify
from tirgen.agents.verifier import RULES, version_of
from tirgen.cli import verify as cli
from tirgen.config import parse

OLD = "0/old"
ROLE = {"endpoint": {"base_url": "http://memory/v1", "model": "scripted"}}
CONFIG = parse({"prompts": "compact", "reasoner": ROLE, "extractor": ROLE}, "test")
CODE = "import math\nprint(math.prod([6, 7]))"

# answer, reference, what the old verifier said, what the answer is
ANSWERS = (
    ("42", "42", True, True),
    ("41", "42", True, False),  # the old verifier let it pass
    ("0.5", r"\frac{1}{2}", False, True),  # and did not know this
    ("7", "8", False, False),
    ("3", "3", None, True),
    (None, "9", False, False),
)
Tirgen = Callable[..., Result]


def made(answer: str | None, problem: Problem, observation: str = "42") -> Trajectory:
    call = ToolCall(CODE, observation, stored.result())
    end = f"So \\boxed{{{answer}}}." if answer else "So."
    return Trajectory(
        problem.key, (Step("Multiply.", call), Step(end)), "Multiply.", End.ANSWERED, answer,
        False, 5, 10,
    )  # fmt: skip


def fill(db: Database, name: str = "old", times: int = 1, observation: str = "42") -> list[int]:
    """A run with every row of ANSWERS `times`, judged by a verifier of old; the trajectories."""
    ids = []
    with db.begin() as session:
        run = stored.add_run(session, name, times * len(ANSWERS))
        run.config = CONFIG.model_dump(mode="json")
        for i, (answer, reference, passed, _) in enumerate(ANSWERS * times):
            problem = Problem(f"Problem {i} of {name}", reference, "test", f"p{i}")
            trajectories.import_problems(session, [problem])
            item = WorkItemRow(
                run_id=run.id, problem_key=problem.key, sample_index=0, fingerprint="f",
                idempotency_key=f"{name}/{i}", state="vetted" if passed else "rejected",
                reject_check=None if passed else Check.ANSWER,
            )  # fmt: skip
            session.add(item)
            session.flush()
            verdicts = (
                Verdict(Check.ANSWER, passed, OLD, "old", {"stage": "string"}),
                Verdict(Check.FORMAT, False, OLD, "old"),
                Verdict(Check.REPRODUCED, True, OLD, "old"),
            )
            done = Completed(
                made(answer, problem, observation), verdicts, None if passed else Check.ANSWER,
                1.0, "m", "m", "c",
            )  # fmt: skip
            ids.append(trajectories.write_trajectory(session, run.id, item.id, done))
    return ids


def judge(db: Database, name: str = "old", checks: str = "answer", **options: Any) -> Any:
    scope = reverify.find(db, name)
    wanted = reverify.chosen(checks.split(","))
    return asyncio.run(reverify.rejudge(db, scope, wanted, **options))


def rows(db: Database, statement: str) -> list[tuple[Any, ...]]:
    with db.session() as session:
        return [tuple(row) for row in session.execute(text(statement))]


def everything(db: Database) -> list[tuple[Any, ...]]:
    """Every byte of every trajectory, step and item."""
    return [
        row
        for table in ("trajectories", "steps", "work_items", "runs", "problems")
        for row in rows(db, f"SELECT {table}::text FROM {table} ORDER BY 1")
    ]


@pytest.fixture
def tirgen(db: Database, monkeypatch: pytest.MonkeyPatch) -> Tirgen:
    app = typer.Typer()
    app.command()(cli.verify)
    app.command()(cli.consensus)
    url = db.url.render_as_string(hide_password=False)
    monkeypatch.setenv("TIRGEN_DATABASE_URL", url)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_new_verdicts_stand_beside_the_old_ones_and_count(db: Database) -> None:
    """The contract: nothing but verdict rows is written, and the newest of each check counts."""
    ids = fill(db)
    versions = "SELECT DISTINCT version FROM current_verdicts"
    assert rows(db, versions) == [(OLD,)], "the control: before, the old ones count"
    before, old = everything(db), rows(db, "SELECT verdicts::text FROM verdicts ORDER BY 1")
    done = judge(db)
    assert (done.n_judged, done.n_skipped, done.failures) == (len(ids), 0, {})
    assert everything(db) == before
    now = rows(db, "SELECT verdicts::text FROM verdicts ORDER BY 1")
    assert set(old) < set(now)
    assert len(now) == len(old) + len(ids), "one new row for each, of the chosen check only"
    current = rows(
        db,
        "SELECT passed, version, evidence->>'stage', duration >= 0 FROM current_verdicts "
        "WHERE check_name = 'answer' ORDER BY trajectory_id",
    )
    assert [row[0] for row in current] == [true for *_, true in ANSWERS]
    assert {row[1] for row in current} == {version_of(Check.ANSWER)}
    assert all(row[2] for row, one in zip(current, ANSWERS, strict=True) if one[0] is not None)
    assert all(row[3] for row in current)


def test_the_confusion_adds_up_with_the_rows(db: Database) -> None:
    """Counted here by hand and by another SQL than the program's."""
    fill(db, times=2)
    judge(db)
    scope = reverify.find(db, "old")
    with db.session() as session:
        found = reverify.confusion(session, scope, [Check.ANSWER])
        changes = reverify.changes(session, scope, [Check.ANSWER], 100)
    expected = Counter((old, new) for _, _, old, new in ANSWERS * 2)
    assert {(t.old, t.new): t.n for t in found} == expected
    assert {(t.old_version, t.new_version) for t in found} == {(OLD, version_of(Check.ANSWER))}
    by_hand = rows(
        db,
        "SELECT a.passed, b.passed, count(*) FROM verdicts a JOIN verdicts b USING "
        "(trajectory_id, check_name) WHERE a.version = '0/old' AND b.version <> '0/old' "
        "GROUP BY 1, 2",
    )
    assert {(t.old, t.new, t.n) for t in found} == set(by_hand)
    assert sum(t.n for t in found if t.changed) == len(changes) == 6
    assert {(c.answer, c.reference) for c in changes} == {
        (answer, reference) for answer, reference, old, new in ANSWERS if old is not new
    }


def test_a_second_run_does_nothing_unless_forced(db: Database) -> None:
    ids = fill(db)
    judge(db)
    n = rows(db, "SELECT count(*) FROM verdicts")
    again = judge(db)
    assert (again.n_judged, again.n_skipped) == (0, len(ids))
    assert rows(db, "SELECT count(*) FROM verdicts") == n
    forced = judge(db, force=True)
    assert (forced.n_judged, forced.n_skipped) == (len(ids), 0)
    assert rows(db, "SELECT count(*) FROM verdicts") == [(n[0][0] + len(ids),)]


def test_a_broken_off_run_goes_on_where_it_stopped(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first batch comes a Ctrl-C; then no trajectory is judged twice, and none left."""
    ids = fill(db, times=2)
    monkeypatch.setattr("tirgen.reverify.BATCH", 4)
    seen: list[int] = []

    def interrupt(n: int) -> None:
        seen.append(n)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(db, advance=interrupt)
    assert seen == [4], "batches are as large as they are said to be"
    rest = judge(db, advance=seen.append)
    assert (rest.n_judged, rest.n_skipped) == (len(ids) - 4, 4)
    assert seen == [4, 4, 4, 4]
    per_trajectory = rows(
        db,
        f"SELECT count(*) FROM verdicts WHERE version = '{version_of(Check.ANSWER)}' "
        "GROUP BY trajectory_id",
    )
    assert per_trajectory == [(1,)] * len(ids)
    scope = reverify.find(db, "old")
    with db.session() as session:
        found = reverify.confusion(session, scope, [Check.ANSWER])
    assert sum(t.n for t in found) == len(ids), "the confusion is of the whole, not of the rest"


def test_stored_code_runs_again_under_the_runs_own_settings(db: Database) -> None:
    """All checks by default, in the real sandbox: a tampered observation is found."""
    good = fill(db, "good")
    bad = fill(db, "bad", observation="43")
    for name in ("good", "bad"):
        assert judge(db, name, ",".join(RULES)).n_judged == len(ANSWERS)
    current = rows(
        db,
        "SELECT trajectory_id, passed FROM current_verdicts "
        "WHERE check_name = 'reproduced' ORDER BY 1",
    )
    assert current == [(i, True) for i in good] + [(i, False) for i in bad]
    checks = rows(db, "SELECT check_name, count(*) FROM current_verdicts GROUP BY 1")
    assert dict(checks) == {check.value: 2 * len(ANSWERS) for check in RULES}


def test_only_what_has_a_new_version_is_made_again(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A better grader costs no code: nothing but the answers are compared again."""
    fill(db)
    judge(db, checks="answer,format")
    versions = {Check.ANSWER: "2/new", Check.FORMAT: version_of(Check.FORMAT)}
    monkeypatch.setattr("tirgen.reverify.version_of", versions.__getitem__)
    n = dict(rows(db, "SELECT check_name, count(*) FROM verdicts GROUP BY 1"))
    judge(db, checks="answer,format")
    now = dict(rows(db, "SELECT check_name, count(*) FROM verdicts GROUP BY 1"))
    assert now == {**n, "answer": n["answer"] + len(ANSWERS)}


def test_a_damaged_trajectory_does_not_stop_the_others(db: Database, tirgen: Tirgen) -> None:
    ids = fill(db)
    with db.begin() as session:
        one = session.execute(select(TrajectoryRow.__table__).limit(1)).mappings().one()
        problem = Problem("Damaged", "1")
        trajectories.import_problems(session, [problem])
        item = WorkItemRow(
            run_id=one["run_id"], problem_key=problem.key, sample_index=0, fingerprint="f",
            idempotency_key="damaged", state="vetted",
        )  # fmt: skip
        session.add(item)
        session.flush()
        own = {"item_id": item.id, "problem_key": problem.key, "content_hash": "0" * 64}
        damaged = {k: v for k, v in one.items() if k != "id"} | own
        session.execute(insert(TrajectoryRow), [damaged])
    done = judge(db)
    assert (done.n_judged, len(done.failures)) == (len(ids), 1)
    assert "content hash" in next(iter(done.failures.values()))
    result = tirgen("verify", "old", "--checks", "answer")
    assert result.exit_code == 1
    assert "1 could not be judged" in result.output


def snapshot(db: Database, name: str, ids: list[int]) -> None:
    """A sealed snapshot of these trajectories."""
    kind = SnapshotKind.TRAJECTORIES
    with db.begin() as session:
        number = snapshots.reserve(session)
        of_each = session.execute(select(TrajectoryRow.id, TrajectoryRow.problem_key))
        keys = {row.id: row.problem_key for row in of_each}
        row = {"snapshot_id": number, "split": "train", "content_hash": "c", "body_hash": "b",
               "verdict_ids": [], "verdicts_hash": "v"}  # fmt: skip
        chosen = [
            {**row, "position": n, "trajectory_id": i, "problem_key": keys[i]}
            for n, i in enumerate(ids)
        ]
        session.execute(insert(ManifestRow), chosen)
        lines = snapshots.manifest(snapshots.driver(session), number, kind)
        digest = snapshots.digest_of(kind, len(ids), lines)
        now = datetime.now(UTC)
        record = Record(name, kind, digest, len(ids), {"train": len(ids)}, {}, "u", now)
        snapshots.seal(session, number, record)


def test_a_snapshot_is_judged_and_nothing_else(db: Database) -> None:
    one, two = fill(db, "one"), fill(db, "two")
    some = [one[1], two[2], two[4]]
    snapshot(db, "some", some)
    assert judge(db, "some").n_judged == 3
    judged = rows(db, f"SELECT trajectory_id FROM verdicts WHERE version <> '{OLD}' ORDER BY 1")
    assert judged == [(i,) for i in some]
    snapshot(db, "one", some)
    with pytest.raises(InputError, match="say run:one or snapshot:one"):
        reverify.find(db, "one")
    assert reverify.find(db, "run:one").n_trajectories == len(ANSWERS)
    assert reverify.find(db, "snapshot:one").n_trajectories == 3


def test_the_command_says_what_has_changed(db: Database, tirgen: Tirgen) -> None:
    ids = fill(db)
    shown = tirgen("verify", "old", "--checks", "answer")
    assert shown.exit_code == 0
    assert f"{len(ids)} judged" in shown.output
    assert "3 of 6 changed (50.0 %)" in shown.output
    result = tirgen("verify", "old", "--checks", "answer", "--format", "json")
    found = json.loads(result.stdout)
    assert (found["n_judged"], found["n_skipped"], found["n_changed"]) == (0, len(ids), 3)
    words = {True: "passed", False: "failed", None: "undecided"}
    expected = {(words[old], words[new]) for _, _, old, new in ANSWERS}
    assert {(row["old"], row["new"]) for row in found["confusion"]} == expected
    assert {row["id"] for row in found["changed"]} == {ids[1], ids[2], ids[4]}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["none"], InputError),
        (["snapshot:old"], InputError),
        (["old", "--checks", "answr"], ConfigError),
        (["old", "--checks", "judge"], ConfigError),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    db: Database, tirgen: Tirgen, arguments: list[str], error: type[Exception]
) -> None:
    fill(db)
    n = rows(db, "SELECT count(*) FROM verdicts")
    result = tirgen("verify", *arguments)
    assert isinstance(result.exception, error)
    assert result.exception.exit_code == 2  # type: ignore[attr-defined]
    assert rows(db, "SELECT count(*) FROM verdicts") == n


def test_what_a_model_wrote_does_not_reach_the_terminal_as_it_is(
    db: Database, tirgen: Tirgen, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = fill(db)
    bad = stored.HOSTILE
    change = reverify.Change(ids[0], Check.ANSWER, False, True, bad, bad, bad)
    monkeypatch.setattr("tirgen.reverify.changes", lambda *_: [change])
    shown = tirgen("verify", "old", "--checks", "answer")
    assert "Changed, for example" in shown.output
    assert "\x1b[31m" not in shown.output
    assert "\u202e" not in shown.output
